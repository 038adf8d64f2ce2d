"""InstructGPT's three steps over transformers models: `sft`, `reward_model`, `rlhf`, and the modules they use."""
