"""ComfyUI's HTTP and WebSocket interface over the embedded host."""
