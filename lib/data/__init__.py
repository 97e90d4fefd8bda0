"""What models are trained on: conversations, and rows of tokens made of them."""
