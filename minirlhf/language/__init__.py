"""InstructGPT's three steps over transformers models: `sft`, `reward_model`, `rlhf`, and what they stand on."""
