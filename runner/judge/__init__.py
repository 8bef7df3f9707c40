"""From records to a summary: metrics, verdicts, findings. Pure."""
