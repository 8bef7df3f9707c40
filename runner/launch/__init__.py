"""A plan carried out: nodes checked and reached, cells started, watched, retried and gathered."""
