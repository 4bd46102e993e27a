"""Network inspection: filters, feature maps, explanations, receptive fields, units."""

from modules.inspection.embeddings import pooled_features
from modules.inspection.explanations import attention, chosen_class, class_names, grad_cam, occlusion, speaking_layer
from modules.inspection.fields import Field, receptive_fields
from modules.inspection.taps import NotApplicableError, check_unit, feature_maps, filters, find_layer, stages, tapped
from modules.inspection.units import Patch, gradient_ascent, top_patches

__all__ = [
    "Field",
    "NotApplicableError",
    "Patch",
    "attention",
    "check_unit",
    "chosen_class",
    "class_names",
    "feature_maps",
    "filters",
    "find_layer",
    "grad_cam",
    "gradient_ascent",
    "occlusion",
    "pooled_features",
    "receptive_fields",
    "speaking_layer",
    "stages",
    "tapped",
    "top_patches",
]
