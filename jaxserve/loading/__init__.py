"""From a model's name to its weights, its tokenizer and its chat template."""
