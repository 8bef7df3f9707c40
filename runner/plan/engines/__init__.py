"""How ranks are started on the chosen nodes: one module per engine."""
