"""A Mixture-of-Experts recipe and headers become expressions: experts, routers, and what surrounds them."""
