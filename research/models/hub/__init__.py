"""What a published family is described with: its config.json read key by key, its tensors as views of the model's own."""

from research.models.hub import parts
from research.models.hub.family import Family
from research.models.hub.keys import Keys
from research.models.hub.tensors import BranchViews, HeadViews, ModelViews, PartViews, Tensor, View, joined

__all__ = ["BranchViews", "Family", "HeadViews", "Keys", "ModelViews", "PartViews", "Tensor", "View", "joined", "parts"]
