"""What changes a loaded model without being one: LoRA, and the tokens learned with it."""
