"""Finds the MoE layers of a transformers model, identifies their routers, runs experts, and routes among a subset of them.

In: a transformers model with the experts interface. Out: `MoELayer`s, their `Router`s, outputs of single experts.
This room uses neither traces nor plans.
"""
