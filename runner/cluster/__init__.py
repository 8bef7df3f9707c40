"""What the cluster is declared to be, observed to be, and able to do at best."""
