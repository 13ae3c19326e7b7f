"""A world that can be listed whole, so that what is elsewhere estimated is here known.

world     prompts, responses, what demonstrations and preferences are drawn from, the reward
policy    a transformer's log-probability of every response
exact     KL, Z(x), optimal policies, expected reward, population losses
optimum   policies that minimise a joint objective, Pareto fronts, distances to them
paths     trains the transformer and measures where it is on the way
"""
