"""Chat with a 4-bit MoE-LoRA vision-language model and see where every token was routed."""
