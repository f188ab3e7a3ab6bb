"""The example workflows, for the editor (`*.json`) and for the API (`api/*.json`), and what writes them."""
