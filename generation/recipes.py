"""The two recipes of gan.py, side by side: flag -> value, in the published recipe and in the default one.

paper   trains the generator against the discriminator alone (NAG paper, sections 3.2 and 4.1). In what was run of it
        here it swung between collapse and varied cells, and its cells ignored their labels.
robust  the default: by likelihood on random cells that have the labels, then also by a policy gradient; see
        generation/likelihood.py. Of the paper it keeps the generator and the labels.
"""

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig

PAPER = {
    # losses: the weights of the sum that the generator minimises
    "adversarial_weight": 1.0,
    "likelihood_weight": 0.0,
    "policy_gradient_weight": 0.0,
    "kl_weight": 0.0,
    # likelihood and policy gradient
    "pool_size": 0,
    "inverse_temperature": 0.0,
    "policy_gradient_cells": 0,
    "warmup_epochs": 0,
    # generator
    "g_emb_size": GeneratorConfig.vertex_size,
    "g_hidden_size": GeneratorConfig.graph_size,
    "g_dropout": GeneratorConfig.dropout,
    "temperature": GeneratorConfig.temperature,
    "chain_cells": GeneratorConfig.chain_cells,
    "autoregressive_edges": GeneratorConfig.autoregressive_edges,
    # discriminator
    "d_emb_size": DiscriminatorConfig.vertex_size,
    "d_hidden_size": DiscriminatorConfig.graph_size,
    "d_gnn_dropout": DiscriminatorConfig.gcn_dropout,
    "d_mlp_dropout": DiscriminatorConfig.mlp_dropout,
    "straight_through": False,
    # optimisation
    "n_epochs": 200,
    "lr": 2e-4,
    "b1": 0.5,
    "lr_schedule": "constant",
    "clip_value": 0.01,
}

ROBUST = {
    # losses
    "adversarial_weight": 0.0,
    "likelihood_weight": 1.0,
    "policy_gradient_weight": 15.0,
    "kl_weight": 0.05,
    # likelihood and policy gradient
    "pool_size": 65536,
    "inverse_temperature": 10.0,
    "policy_gradient_cells": 256,
    "warmup_epochs": 18,
    # generator
    "g_emb_size": 64,
    "g_hidden_size": 32,
    "g_dropout": 0.0,
    "temperature": 1.0,
    "chain_cells": True,
    "autoregressive_edges": True,
    # discriminator, where --adversarial_weight adds it
    "d_emb_size": 64,
    "d_hidden_size": 32,
    "d_gnn_dropout": 0.1,
    "d_mlp_dropout": 0.1,
    "straight_through": True,
    # optimisation
    "n_epochs": 28,
    "lr": 2e-3,
    "b1": 0.9,
    "lr_schedule": "cosine",
    "clip_value": 1.0,
}


def warmup_for(n_epochs: int, recipe: dict) -> int:
    """The warm-up of a run of n_epochs: the recipe's, and of a shorter run the same share, at least one epoch."""
    return min(recipe["warmup_epochs"], max(1, round(n_epochs * recipe["warmup_epochs"] / recipe["n_epochs"])))
