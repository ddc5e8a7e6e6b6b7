"""Training the generator (the published game, the likelihood, their recipes), and what is asked of it and measured."""
