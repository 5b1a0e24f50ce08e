"""One point of a grid: what decides how an SAE is trained, on which hooks."""

from dataclasses import asdict, dataclass
from typing import Any

from saebench.sae import Ends
from saebench.train.schedules import DECAY, WARMUP


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One point of a grid. Sparsity is set by exactly one of k, target_l0 and l1."""

    name: str
    hook: str = ""
    """of an SAE; others have what follows"""
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    skip: bool = False
    set: str = ""
    """name of the dictionaries that belong together, of several layers"""
    joint: bool = False
    """whether what is to be written at a hook is the sum over the set"""
    architecture: str
    d_sae: int
    k: int | None = None
    target_l0: float | None = None
    l1: float | None = None
    lr: float
    warmup: float = WARMUP
    decay: float = DECAY
    edition: int = 1
    """the row of `EDITIONS`"""
    pace: float = 1.0
    """of the controller that meets target_l0"""
    control: str = ""
    """the constraint under which it is trained as a control"""
    seed: int

    @property
    def ends(self) -> Ends:
        return Ends(self.reads or (self.hook,), self.writes or (self.hook,))

    @property
    def team(self) -> str:
        """Those that take their steps together: the members of a joint set, and every other alone."""
        return self.set if self.joint else self.name

    def to_json(self) -> dict[str, Any]:
        """The fields; `edition` and `pace` where they are not 1, which they were for all once, and of an SAE none that it had not then."""
        values = asdict(self)
        for name in ("edition", "pace"):
            if values[name] == 1:
                del values[name]
        if not self.control:
            del values["control"]
        if not self.joint:
            del values["set"], values["joint"]  # decides nothing
        if not self.reads:
            del values["reads"], values["writes"], values["skip"]
            return values
        del values["hook"]
        return values | {"reads": list(self.reads), "writes": list(self.writes)}
