"""minirlhf: from REINFORCE to InstructGPT."""
