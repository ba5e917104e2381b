"""The ground: specs, the expression language, its meaning and cost, and the protocols of graphs, hosts and sites."""
