"""Test `sft`: DeepSpeed supervised fine-tuning of a decoder."""
