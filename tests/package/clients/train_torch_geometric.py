"""PyTorch Geometric: GatedGraphConv (GRUCell), LSTM aggregation and Set2Set on graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GatedGraphConv, LSTMAggregation, Set2Set


class Network(nn.Module):
    """Maps nodes [N,8] and edges [2,E] of G graphs to [G,1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = GatedGraphConv(8, num_layers=3)
        self.lstm = LSTMAggregation(8, 8)
        self.pool = Set2Set(8, processing_steps=3)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = self.conv(x, edges)
        return self.head(torch.cat([self.lstm(x, graph), self.pool(x, graph)], dim=1))


def build() -> Any:
    return Network()


def roots(network: Any) -> Iterable[nn.Module]:
    return [network]


def train(network: Any) -> tuple[Iterable[nn.Module], dict[str, Any]]:
    sizes = torch.tensor([5, 9, 7, 4])
    graph = torch.arange(4).repeat_interleave(sizes)
    first = sizes.cumsum(0) - sizes
    # six edges from each node to nodes of the same graph
    sources = torch.arange(25).repeat(6)
    targets = first[graph[sources]] + (torch.rand(150) * sizes[graph[sources]]).long()
    x, edges, goal = torch.randn(25, 8), torch.stack([sources, targets]), torch.randn(4, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(network(x, edges, graph), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    results = {"losses": losses, "prediction": network(x, edges, graph)}
    return [network], results | dict(network.named_parameters())
