"""How good scores and selections are: judged against known truth, by retraining, and by training on what was kept."""
