"""What sparsity costs on real text: prompts with a known answer, ways to run them, and ways to compare logits."""
