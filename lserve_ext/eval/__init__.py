"""What sparsity costs on real text: prompts with a known answer, ways to run them, and ways to compare logits."""

TEXT, GENERATION = "text", "generation"
"""Tasks beside those with a known answer: a text that is followed, and what dense attention generates after one."""
