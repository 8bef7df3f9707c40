"""From a base model to a trained one: stages, what each needs and leaves, and what verl is told."""
