"`sft` on two ranks: the curve of one, also where a rank's share leaves a parameter untouched."
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vlarepro.training.sft import SFTConfig, normal, sft

CONFIG = SFTConfig(steps=12, batch=8, lr={"all": 1e-2}, weight_decay=0.01, warmup=0.1, clip=1.0, seed=0)


class Rare:
    "A linear model with a branch that only rows below 5 use."
    n, words = 40, 4

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"usual": nn.Linear(3, 1), "rare": nn.Linear(3, 1)})
        self.groups = {"all": list(self.module.parameters())}
        self.x = torch.randn(self.n, 3, generator=torch.Generator().manual_seed(1))

    def loss(self, rows, u):
        x = self.x[rows] + 0.1 * normal(u)[:, :3]
        few = torch.as_tensor(rows < 5)
        out = self.module["usual"](x)
        if few.any(): out = out + few[:, None] * self.module["rare"](x)
        return {"fit": (out - self.x[rows].sum(-1, keepdim=True)).pow(2).mean()}


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    task = Rare()
    torch.save({"curve": sft(task, CONFIG), "weights": task.module.state_dict()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_curve_of_one(tmp_path):
    torch.multiprocessing.spawn(rank_main, (2, str(tmp_path)), nprocs=2)
    one = Rare()
    curve = sft(one, CONFIG)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    assert ranks[0]["curve"] == ranks[1]["curve"], "each rank must report the mean over all"
    assert max(abs(a["fit"] - b["fit"]) for a, b in zip(curve, ranks[0]["curve"])) < 1e-6
    for k, v in one.module.state_dict().items():
        assert torch.equal(ranks[0]["weights"][k], ranks[1]["weights"][k]) and (ranks[0]["weights"][k] - v).abs().max() < 1e-5
