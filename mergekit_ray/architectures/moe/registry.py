"""The families there are, and which one a recipe's models belong to."""

from __future__ import annotations

from mergekit_ray.architectures.moe.family import DenseModel, MoeFamily, Wanted
from mergekit_ray.core.errors import ModelError
from mergekit_ray.core.registry import Registry

FAMILIES: Registry[type[MoeFamily]] = Registry(
    "MoE architecture", "mergekit_ray.architectures.moe", "mergekit_ray.moe_families"
)


def choose(base: DenseModel, wanted: Wanted, name: str | None = None) -> MoeFamily:
    """The family of the result.

    Args:
        base: the model that gives everything outside the feed-forward layers.
        wanted: what the family must hold.
        name: ``architecture`` of the recipe, None for the first family that fits.

    Raises:
        ConfigError: there is no family of that name.
        ModelError: it does not fit, or none does; with the reasons of each.
    """
    families = sorted((FAMILIES.get(each)() for each in FAMILIES.names()), key=lambda family: family.rank)
    if name is not None:
        spelt = {alias: family.name for family in families for alias in family.aliases}
        family = FAMILIES.get(spelt.get(name, name))()
        reasons = family.objections(base, wanted)
        if reasons:
            raise ModelError(
                f"architecture {family.name} {'; '.join(reasons)}",
                where=f"model {base.reference}",
                remedy=_remedy([other for other in families if not other.objections(base, wanted)], families),
            )
        return family
    found: list[str] = []
    for family in families:
        reasons = family.objections(base, wanted)
        if not reasons:
            return family
        found.append(f"{family.name}: {'; '.join(reasons)}")
    raise ModelError(
        "no MoE architecture can hold these models:\n  " + "\n  ".join(found),
        where=f"model {base.reference}",
        remedy=_remedy([], families),
    )


def family_of(model: DenseModel) -> MoeFamily | None:
    """The family of a model that is a Mixture of Experts already; None if it is dense, or of no family here."""
    families = (FAMILIES.get(name)() for name in FAMILIES.names())
    return next((family for family in families if family.holds(model)), None)


def _remedy(fitting: list[MoeFamily], families: list[MoeFamily]) -> str:
    if fitting:
        names = ", ".join(family.name for family in fitting)
        return f"these architectures fit: {names}; leave `architecture` out to take the first"
    listed = "; ".join(f"{family.name} from {', '.join(family.dense_types)}" for family in families)
    return f"known architectures: {listed}"
