"""Every setting of a run: one frozen tree, read from a recipe and dotted overrides, validated once.

One dotted name (`family.loss.std`) is the YAML path, the command-line override, the sweep key and the
MLflow parameter. This module imports neither torch nor ray, so that a config error costs nothing.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service import masks

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Range = tuple[float, float]

_INTERVAL = re.compile(r"(\d+(?:\.\d+)?) (steps|epochs|minutes)")


def _check_interval(text: str) -> str:
    match = _INTERVAL.fullmatch(text)
    if match is None or float(match[1]) <= 0:
        raise ValueError("must be a positive number and a unit, such as '10 steps', '5 epochs' or '2.5 minutes'")
    return text


def _check_step_interval(text: str) -> str:
    if _check_interval(text).endswith("minutes"):
        raise ValueError("must be in steps or epochs, such as '10 steps': all ranks take part, and their clocks differ")
    return text


Interval = Annotated[str, AfterValidator(_check_interval)]
StepInterval = Annotated[str, AfterValidator(_check_step_interval)]


def parse_interval(text: str) -> tuple[float, Literal["steps", "epochs", "minutes"]]:
    """Split `'5 epochs'` into `(5.0, 'epochs')`."""
    amount, unit = _check_interval(text).split()
    return float(amount), unit  # pyright: ignore[reportReturnType]  (the pattern allows these units only)


def _ordered(low_high: Range, name: str) -> None:
    if low_high[0] > low_high[1]:
        raise ValueError(f"{name}={low_high} must be (low, high) with low ≤ high: swap the two values")


class Frozen(BaseModel):
    """Base of every config type: immutable, unknown keys are errors, defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def plain(self) -> dict[str, Any]:
        """Return the whole tree as JSON-ready plain values, every default written out."""
        return self.model_dump(mode="json")


class RandAugment(Frozen):
    """Operations drawn at random for each view (Cubuk et al. 2020); the defaults are DeiT's `rand-m9-mstd0.5-inc1`."""

    ops: Count = Field(2, description="operations one after the other")
    magnitude: Annotated[float, Field(ge=0, le=10)] = Field(9.0, description="mean strength of an operation")
    spread: NonNegative = Field(0.5, description="standard deviation of the strength, which stays within 0 and 10")
    probability: Fraction = Field(0.5, description="probability that an operation is applied once drawn")


class Augment(Frozen):
    """Random view of an image; probabilities in [0, 1], colour strengths as in torchvision's ColorJitter."""

    crop_scale: Range = Field((0.2, 1.0), description="area of the random crop, as a share of the image")
    crop_ratio: Range = Field((3 / 4, 4 / 3), description="aspect ratio of the crop, drawn log-uniformly")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="largest rotation in degrees, either way")
    shear: Annotated[float, Field(ge=0, le=60)] = Field(
        0.0, description="largest horizontal shear in degrees, either way"
    )
    jitter: Fraction = Field(0.8, description="probability of the colour jitter")
    brightness: Fraction = 0.4
    contrast: Fraction = 0.4
    saturation: Fraction = 0.2
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.1
    grey: Fraction = Field(0.2, description="probability of dropping colour")
    blur: Fraction = Field(0.0, description="probability of a Gaussian blur")
    blur_sigma: Range = Field((0.1, 2.0), description="standard deviation of the blur in pixels")
    solarize: Fraction = Field(0.1, description="probability of inverting the pixels above one half")
    three_augment: Fraction = Field(
        0.0, description="probability of exactly one of grey, blur and solarize, as in DeiT III (Touvron et al. 2022)"
    )
    randaugment: RandAugment | None = Field(None, description="none: no such operations")
    erase: Fraction = Field(0.0, description="probability that a rectangle becomes noise (Zhong et al. 2020)")
    erase_scale: Range = Field((0.02, 1 / 3), description="area of that rectangle, as a share of the view")
    erase_ratio: Range = Field((0.3, 3.3), description="its aspect ratio, drawn log-uniformly")
    mixup: NonNegative = Field(0.0, description="α of mix-up, λ ~ Beta(α, α); 0: none; all views are mixed alike")
    cutmix: NonNegative = Field(0.0, description="α of CutMix; with mix-up, each sample takes one of the two")

    @model_validator(mode="after")
    def _check(self) -> Augment:
        for name in ("crop_scale", "crop_ratio", "blur_sigma", "erase_scale", "erase_ratio"):
            _ordered(getattr(self, name), name)
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("crop_scale", "erase_scale"):
            if getattr(self, name)[1] > 1:
                raise ValueError(f"{name}={getattr(self, name)} must stay ≤ 1: a part cannot exceed its image")
        if self.three_augment and (self.grey or self.blur or self.solarize):
            raise ValueError(
                f"three_augment={self.three_augment} takes one of grey, blur and solarize in place of "
                f"grey={self.grey}, blur={self.blur}, solarize={self.solarize}: set these three to 0"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


class LocalCrops(Frozen):
    """Small views of an image beside the global ones: multi-crop (Caron et al. 2020)."""

    count: Count = Field(6, description="local crops of an image")
    size: Annotated[int, Field(ge=8)] = Field(description="side of the square crops in pixels")
    crop_scale: Range = Field((0.05, 0.3), description="area of a crop, as a share of the image")


class Source(Frozen):
    """One source of a mixture."""

    uri: str = Field(min_length=1, description="folder or s3:// address of a data set")
    weight: Positive = Field(1.0, description="share of the samples, relative to the other sources")
    split: str = "train"


class Data(Frozen):
    """Where the samples come from and how they become batches."""

    uri: str = Field(min_length=1, description="folder or s3:// address that `tessera shard` wrote")
    train_split: str = "train"
    val_split: str = Field("val", description="split that chooses: champion, best snapshots, sweeps")
    test_split: str = Field("test", description="split that is reported once, at the end")
    image_size: Annotated[int, Field(ge=8)] = Field(32, description="side of the square views in pixels")
    eval_image_size: Annotated[int, Field(ge=8)] = Field(
        default_factory=lambda data: data.get("image_size", 32),
        description="side in pixels at evaluation and serving; image_size if not given (Touvron et al. 2019)",
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(256, description="samples of one global step, over all workers")
    partitions: Count = Field(64, description="canonical partitions of the plan, lowered until they divide the batch")
    window: Count | None = Field(
        None, description="samples of one partition that are shuffled together; none: a mean shard's, at most 4096"
    )
    mixture: dict[str, Source] = Field(
        {}, description="sources to train on instead of uri's train split, by name; uri still serves evaluation"
    )
    steps_per_epoch: Count | None = Field(None, description="what a mixture calls an epoch")
    mode: Literal["auto", "resident", "stream"] = Field("auto", description="resident: decode once into memory")
    resident_gb: Positive = Field(4.0, description="largest decoded training split that `auto` keeps in memory, in GB")
    cache_gb: Positive = Field(20.0, description="byte budget of a node's shard cache, in GB")
    deadline_minutes: Positive = Field(
        5.0, description="how long the store of the data may be away before the run fails"
    )
    prefetch: Count = Field(8, description="shards fetched at once, at most one window ahead")
    max_bad: Annotated[int, Field(ge=0)] = Field(
        0, description="samples of an epoch that may be unreadable and are replaced by others"
    )
    workers: Count = Field(2, description="threads that decode images in parallel")
    augment: Augment = Augment()  # pyright: ignore[reportCallIssue]
    local: LocalCrops | None = Field(None, description="small crops beside the global views, augmented alike")

    @property
    def local_augment(self) -> Augment:
        """Augmentation of the local crops: that of the global views but for the area of the crop."""
        assert self.local is not None
        return self.augment.model_copy(update={"crop_scale": self.local.crop_scale})

    @property
    def largest_side(self) -> int:
        """Side in pixels of the largest squares that any encoder is given: what images are decoded for."""
        return max(self.image_size, self.eval_image_size)

    @model_validator(mode="after")
    def _splits_differ(self) -> Data:
        splits = [self.train_split, self.val_split, self.test_split]
        if len(set(splits)) < len(splits):
            raise ValueError(f"train_split, val_split, test_split={splits} must differ: scores need unseen samples")
        return self

    @model_validator(mode="after")
    def _local_crops_are_small(self) -> Data:
        if self.local is not None:
            Augment(crop_scale=self.local.crop_scale)  # pyright: ignore[reportCallIssue]
            if self.local.size > self.image_size:
                raise ValueError(
                    f"local.size={self.local.size} must not exceed image_size={self.image_size}: lower local.size"
                )
        return self

    @model_validator(mode="after")
    def _mixture_has_epochs(self) -> Data:
        if bool(self.mixture) != (self.steps_per_epoch is not None):
            raise ValueError(
                f"steps_per_epoch={self.steps_per_epoch} with {len(self.mixture)} sources in mixture: "
                "a mixture needs it, and one data set has its own: give both or neither"
            )
        if self.mixture and self.mode == "resident":
            raise ValueError("mode=resident holds one data set, not a mixture: use mode=stream")
        return self


class ResNet(Frozen):
    """Residual network (He et al. 2015)."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[8, 10, 18, 20, 34, 50] = 18
    width: Count = Field(64, description="channels of the first stage; each later stage doubles them")
    stem: Literal["32px", "64px", "224px"] = Field(
        "32px", description="images it is for: 3×3 convolution, 3×3 of stride 2, 7×7 of stride 2 and max-pool"
    )
    norm: Literal["batch", "group"] = "batch"


class ViT(Frozen):
    """Vision transformer (Dosovitskiy et al. 2020) with timm's parameters, mean-pooled over its patches."""

    kind: Literal["vit"] = "vit"
    size: Literal["tiny", "small", "base", "large", "huge"] = "tiny"
    patch_size: Count = 4
    depth: Count | None = Field(None, description="blocks; none takes those of the size")
    positions: Literal["learned", "sincos", "rope"] = "learned"
    layer_scale: Positive | None = Field(None, description="first value of LayerScale, such as 1e-5")
    drop_path: Fraction = Field(0.0, description="stochastic depth of the last block; earlier ones drop less")
    attention: Literal["auto", "fused", "plain"] = Field("auto", description="auto takes the faster one on the device")
    checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.depth or {"large": 24, "huge": 32}.get(self.size, 12)


Encoder = Annotated[ResNet | ViT, Field(discriminator="kind")]


class Projector(Frozen):
    """MLP between the representation and the loss."""

    layers: Annotated[int, Field(ge=0)] = Field(
        3, description="linear layers; all but the last are followed by norm and ReLU; 0 leaves the representation"
    )
    hidden: Count = 2048
    output: Annotated[int, Field(ge=2)] = 2048
    norm: Literal["batch", "layer"] = "batch"


class _VicregTerms(Frozen):
    inv: NonNegative = Field(25.0, description="weight of the invariance term")
    std: NonNegative = Field(25.0, description="weight of the variance term")
    cov: NonNegative = Field(1.0, description="weight of the covariance term")
    gamma: Positive = Field(1.0, description="standard deviation that the variance term asks for")
    cov_norm: Literal["paper", "offdiag_mean"] = Field(
        description="divisor of the squared off-diagonal covariances: D, or D(D−1) as in eb_jepa"
    )


class VicregLoss(_VicregTerms):
    """Variance-invariance-covariance regularisation (Bardes, Ponce and LeCun 2022, eq. 1–6)."""

    kind: Literal["vicreg"] = "vicreg"


class _Sliced(Frozen):
    variant: Literal["bcs", "lejepa"] = Field("lejepa", description="published form of SIGReg: eb_jepa's or LeJEPA's")
    slices: Count = Field(
        default_factory=lambda data: {"bcs": 256, "lejepa": 1024}.get(data.get("variant", "lejepa"), 1024),
        description="random directions of a step; 256 for bcs and 1024 for lejepa if not given, as published",
    )


class SigregLoss(_Sliced):
    """Invariance and SIGReg: `bcs` inv + weight · SIGReg (eb_jepa), `lejepa` (1 − weight) · inv + weight · SIGReg."""

    kind: Literal["sigreg"] = "sigreg"
    weight: NonNegative = Field(
        default_factory=lambda data: {"bcs": 10.0, "lejepa": 0.02}.get(data.get("variant", "lejepa"), 0.02),
        description="λ; 10 for bcs and 0.02 for lejepa if not given, as published",
    )

    @model_validator(mode="after")
    def _check(self) -> SigregLoss:
        if self.variant == "lejepa" and self.weight > 1:
            raise ValueError(
                f"weight={self.weight} must not exceed 1, as variant=lejepa gives the invariance 1 − weight: "
                "lower it, or use variant=bcs"
            )
        return self


class VicregSigregLoss(_VicregTerms, _Sliced):
    """VICReg with SIGReg added: both keep the embeddings from collapsing."""

    kind: Literal["vicreg_sigreg"] = "vicreg_sigreg"
    sigreg: NonNegative = Field(1.0, description="weight of SIGReg")


class NtXentLoss(Frozen):
    """SimCLR's normalised temperature-scaled cross-entropy, the mean over pairs of views (Chen et al. 2020)."""

    kind: Literal["nt_xent"] = "nt_xent"
    temperature: Positive = 0.5


ViewLoss = Annotated[VicregLoss | SigregLoss | VicregSigregLoss | NtXentLoss, Field(discriminator="kind")]


class FamilyConfig(Frozen):
    """Base of every family's config; `Name` of kind `name` is built by `NameFamily` in `service/families/name.py`."""

    components: ClassVar[tuple[str, ...]]  # trained modules of the family
    takes_local_crops: ClassVar[bool] = False

    def encoder_options(self) -> dict[str, Any]:
        """What `build_encoder` takes besides the image size, to build the encoder that is evaluated."""
        return self.model_dump(include={"encoder"})["encoder"]

    def check(self, data: Data) -> None:
        """Raise ValueError, which begins with a setting's name, where the family cannot train on such data."""


class ImageVicreg(FamilyConfig):
    """Joint embedding of augmented views of an image."""

    components: ClassVar[tuple[str, ...]] = ("encoder", "projector")
    takes_local_crops: ClassVar[bool] = True

    kind: Literal["image_vicreg"] = "image_vicreg"
    views: Annotated[int, Field(ge=2)] = Field(2, description="global views of an image")
    encoder: Encoder = ResNet()  # pyright: ignore[reportCallIssue]
    projector: Projector = Projector()  # pyright: ignore[reportCallIssue]
    loss: ViewLoss


class TargetBlocks(Frozen):
    """Rectangles of patches: how many, their area as a share of the grid, height ÷ width."""

    count: Count
    scale: Range
    aspect: Range = (1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> TargetBlocks:
        for name in ("scale", "aspect"):
            _ordered(getattr(self, name), name)
            if getattr(self, name)[0] <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.scale[1] > 1:
            raise ValueError(f"scale={self.scale} must stay ≤ 1: a block cannot exceed its grid")
        return self

    def build(self) -> masks.Blocks:
        """As the mask functions take it."""
        return masks.Blocks(self.count, self.scale, self.aspect)


def _blocks(count: int, scale: Range, aspect: Range = (1.0, 1.0)) -> TargetBlocks:
    return TargetBlocks(count=count, scale=scale, aspect=aspect)


class _MultiblockMasking(Frozen):
    contexts: TargetBlocks
    targets: TargetBlocks

    def build(self, grid: tuple[int, int]) -> masks.Masking:
        """Masking of a grid, or ValueError when it leaves no context."""
        return masks.Multiblock(grid, self.contexts.build(), self.targets.build())


class PaperMasking(_MultiblockMasking):
    """One large context block minus four target blocks (Assran et al. 2023), without the published code's biases."""

    kind: Literal["paper"] = "paper"
    contexts: TargetBlocks = _blocks(1, (0.85, 1.0))
    targets: TargetBlocks = _blocks(4, (0.15, 0.2), (0.75, 1.5))


class GuideMasking(_MultiblockMasking):
    """The union of four context blocks, and two target blocks that never overlap it."""

    kind: Literal["guide"] = "guide"
    contexts: TargetBlocks = _blocks(4, (0.15, 0.2), (0.75, 1.5))
    targets: TargetBlocks = _blocks(2, (0.1, 0.15), (0.75, 1.5))


class BlockMasking(Frozen):
    """One target block; the context is everything else."""

    kind: Literal["block"] = "block"
    targets: TargetBlocks = _blocks(1, (0.3, 0.5), (0.75, 1.5))

    def build(self, grid: tuple[int, int]) -> masks.Masking:
        """Masking of a grid, or ValueError when it leaves no context."""
        return masks.Multiblock(grid, masks.Blocks(1, (1.0, 1.0)), self.targets.build())


class RandomMasking(Frozen):
    """Patches chosen one by one."""

    kind: Literal["random"] = "random"
    ratio: Fraction = Field(0.6, description="share of the patches that are the target")

    def build(self, grid: tuple[int, int]) -> masks.Masking:
        """Masking of a grid, or ValueError when it leaves no context."""
        return masks.Random(grid, self.ratio)


class ReferenceMasking(Frozen):
    """The published I-JEPA collator's algorithm with its biases, for comparison."""

    kind: Literal["reference"] = "reference"
    contexts: TargetBlocks = _blocks(1, (0.85, 1.0))
    targets: TargetBlocks = _blocks(4, (0.15, 0.2), (0.75, 1.5))
    min_keep: Count = Field(10, description="a context has more patches than this")

    def build(self, grid: tuple[int, int]) -> masks.Masking:
        """Masking of a grid, or ValueError when the published code would never find a place."""
        return masks.Reference(grid, self.contexts.build(), self.targets.build(), self.min_keep)


Masking = Annotated[
    PaperMasking | GuideMasking | BlockMasking | RandomMasking | ReferenceMasking, Field(discriminator="kind")
]


class Curriculum(Frozen):
    """Targets that start few and small and grow, stage by stage, to those of `masking`."""

    stages: Annotated[int, Field(ge=2)] = Field(
        4, description="parts of the run; token counts change between them only"
    )
    count: Count = Field(1, description="target blocks of the first stage")
    scale: Range = Field((0.05, 0.1), description="area of the first stage's blocks, as a share of the grid")


class Momentum(Frozen):
    """How the target encoder follows: w̄ ← τ·w̄ + (1 − τ)·w, τ from `start` to `end`."""

    start: Fraction = 0.996
    end: Fraction = 1.0
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="share of the run over which τ gets from start to end, where it stays"
    )


class PredictorViT(Frozen):
    """Narrow ViT from context tokens to target tokens."""

    width: Annotated[int, Field(ge=4)] = 384
    depth: Count = 6
    heads: Count = 12

    @model_validator(mode="after")
    def _check(self) -> PredictorViT:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width={self.width} must be divisible by 4 × heads={self.heads}: use width="
                f"{max(1, round(self.width / (4 * self.heads))) * 4 * self.heads} or other heads"
            )
        return self


class Jepa(FamilyConfig):
    """What the families share that predict hidden blocks."""

    components: ClassVar[tuple[str, ...]] = ("context_encoder", "predictor")
    takes_local_crops: ClassVar[bool] = True
    encoder: ViT = ViT(positions="sincos")  # pyright: ignore[reportCallIssue]
    views: Literal[1, 2] = Field(1, description="augmented views of an image, each predicted under the same masks")
    predictor: PredictorViT = PredictorViT()
    masking: Masking = PaperMasking()
    curriculum: Curriculum | None = Field(None, description="how masks grow over the run; none: they do not")
    momentum: Momentum | None = Field(
        Momentum(),  # pyright: ignore[reportCallIssue]
        description="of the target encoder; none: targets come from the encoder itself, with gradients",
    )
    loss: Literal["smooth_l1", "mse", "cosine"] = "smooth_l1"
    normalise_targets: Literal["layer", "l2", "none"] = Field(
        "layer", description="each target token: layer-normalised without affine, divided by its length, or as it is"
    )
    regulariser: ViewLoss | None = Field(
        None, description="loss of pooled views: two views' contexts, or one view's context and target; local crops"
    )
    regulariser_weight: NonNegative = Field(0.1, description="λ, of the regulariser's mean over levels")
    eval_encoder: Literal["target", "context"] = Field("target", description="the one evaluated, exported and served")

    def grid(self, image_size: int) -> tuple[int, int]:
        """Patches of a view, (rows, columns)."""
        side = image_size // self.encoder.patch_size
        return side, side

    def maskings(self, image_size: int) -> tuple[masks.Masking, ...]:
        """Masking of each stage of the curriculum, one without; ValueError for a stage that cannot be."""
        return self._stages(self.grid(image_size))

    def _stages(self, grid: tuple[int, int]) -> tuple[masks.Masking, ...]:
        try:
            last = self.masking.build(grid)
        except ValueError as error:
            raise ValueError(f"family.masking.{error}") from None
        if self.curriculum is None:
            return (last,)
        if not isinstance(last, masks.Multiblock):
            raise ValueError(
                f"family.curriculum grows target blocks, and family.masking.kind={self.masking.kind} is none of "
                "'paper', 'guide', 'block': choose one of them, or leave the curriculum out"
            )
        first, stages = self.curriculum, self.curriculum.stages
        targets = masks.Blocks(first.count, first.scale, last.targets.aspect)
        try:
            return masks.curriculum(masks.Multiblock(grid, last.contexts, targets), last, stages)
        except ValueError as error:
            raise ValueError(f"family.curriculum, a stage between its own targets and masking's: {error}") from None

    def check(self, data: Data) -> None:
        """Refuse masks that cannot be, at any stage, and what needs a regulariser without one."""
        if self.regulariser is None and self.momentum is None:
            raise ValueError(
                "family.momentum=None lets targets follow the loss, and nothing keeps them apart: set "
                "family.regulariser, such as {kind: sigreg, weight: 1.0}, or give the target encoder its momentum"
            )
        if self.regulariser is None and data.local is not None:
            raise ValueError(
                "data.local gives small crops to the regulariser, and family.regulariser is none: set it, such as "
                "{kind: vicreg, cov_norm: paper}, or leave data.local out"
            )
        self.maskings(data.image_size)


class IJepa(Jepa):
    """Prediction of the representations of hidden blocks (Assran et al. 2023)."""

    kind: Literal["ijepa"] = "ijepa"
    target: Literal["patch", "pooled"] = Field("patch", description="predict a block's tokens, or their mean")


class HJepa(Jepa):
    """I-JEPA on several levels of a pyramid: the patch grid, pooled 2×2, 4×4 …, each taken deeper in the encoder."""

    kind: Literal["hjepa"] = "hjepa"
    masking: Masking = PaperMasking(targets=_blocks(2, (0.15, 0.25), (0.75, 1.5)))
    regulariser: ViewLoss | None = VicregLoss(cov_norm="paper")  # pyright: ignore[reportCallIssue]
    levels: Annotated[int, Field(ge=2, le=4)] = 3
    whole_image: bool = Field(False, description="the last level is the whole image's mean instead of a pooled grid")
    depths: tuple[Count, ...] | None = Field(
        None, description="block that each level is taken after, finest level first; none spreads them evenly"
    )
    fpn: Literal["add", "concat"] | None = Field(None, description="feature pyramid: how a level takes the coarser in")
    weights: tuple[NonNegative, ...] | None = Field(
        None, description="of the levels' losses, finest first; none halves from level to level: 1, 0.5, 0.25 …"
    )
    eval_level: Annotated[int, Field(ge=1, le=4)] | Literal["all"] | None = Field(
        None, description="level that is evaluated, exported and served, 1 is the finest; none takes the last"
    )

    @property
    def unit(self) -> int:
        """Side in patches of the cells of the coarsest grid: masks consist of whole cells."""
        return 2 ** (self.levels - 1 - self.whole_image)

    def encoder_options(self) -> dict[str, Any]:
        """As of any family, with the pyramid's settings."""
        pyramid = self.model_dump(include={"levels", "whole_image", "depths", "fpn", "eval_level"})
        return super().encoder_options() | pyramid | {"kind": "pyramid"}

    def maskings(self, image_size: int) -> tuple[masks.Masking, ...]:
        """Masking of each stage in whole cells of the coarsest grid."""
        rows, columns = (side // self.unit for side in self.grid(image_size))
        return tuple(masks.Coarse(masking, columns, self.unit) for masking in self._stages((rows, columns)))

    def check(self, data: Data) -> None:
        """Refuse grids that do not divide into cells, and settings that do not fit the number of levels."""
        side = self.grid(data.image_size)[0]
        if side % self.unit:
            patch = self.encoder.patch_size
            near = max(1, round(side / self.unit)) * self.unit * patch
            raise ValueError(
                f"family.levels={self.levels} needs a grid that {self.unit}×{self.unit} cells tile, and it has "
                f"{side}×{side} patches: use data.image_size={near}, another patch_size or fewer levels"
            )
        self._check_levels()
        super().check(data)

    def _check_levels(self) -> None:
        for name in ("depths", "weights"):
            given = getattr(self, name)
            if given is not None and len(given) != self.levels:
                raise ValueError(f"family.{name}={given} must have one value for each of family.levels={self.levels}")
        blocks = self.encoder.blocks
        if self.depths is not None and [*self.depths[:-1], blocks] != sorted(self.depths):
            raise ValueError(
                f"family.depths={self.depths} must ascend and end with the encoder's last block, {blocks}: "
                "a coarser level is no earlier, and blocks after the last level would not be trained"
            )
        if isinstance(self.eval_level, int) and self.eval_level > self.levels:
            raise ValueError(
                f"family.eval_level={self.eval_level} exceeds family.levels={self.levels}: use one of them"
            )
        if self.weights is not None and not sum(self.weights):
            raise ValueError(f"family.weights={self.weights} are all zero: nothing would be learned")


Family = Annotated[ImageVicreg | IJepa | HJepa, Field(discriminator="kind")]


class Optimizer(Frozen):
    """What all optimisers share; biases, norms, tokens and positions never decay."""

    lr: Positive
    weight_decay: NonNegative
    weight_decay_of: dict[str, NonNegative] = Field(
        {}, description="weight decay of single components of the family, such as {predictor: 0.04}; stays constant"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="rate of an encoder's layer, relative to the next one's: a ViT's blocks, a ResNet's stages"
    )
    clip_norm: Positive | None = Field(None, description="largest global gradient norm")


class Lars(Optimizer):
    """Layer-wise adaptive rates over momentum SGD (You, Gitman and Ginsburg 2017)."""

    kind: Literal["lars"] = "lars"
    lr: Positive = 0.3
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = 0.9
    trust: Positive = Field(0.02, description="trust coefficient η")
    clip_lr: bool = Field(True, description="never adapt a layer's rate above lr")


class Lamb(Optimizer):
    """Layer-wise adaptive rates over Adam with decoupled weight decay (You et al. 2020)."""

    kind: Literal["lamb"] = "lamb"
    lr: Positive = 3e-3
    weight_decay: NonNegative = 0.02
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-6


class Sgd(Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = 0.9
    nesterov: bool = False


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015); its weight decay is added to the gradient."""

    kind: Literal["adam"] = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8


Optim = Annotated[Lars | Lamb | Sgd | Adam | AdamW, Field(discriminator="kind")]


class Schedule(Frozen):
    """Length of the run; learning rate by linear warm-up, then cosine to `min_lr`, stepped every step."""

    epochs: Positive = 50.0
    steps: Count | None = Field(None, description="length in steps; overrides `epochs`")
    warmup_epochs: NonNegative = 5.0
    start_lr: NonNegative = Field(3e-5, description="rate of the first step")
    min_lr: NonNegative = Field(0.0, description="rate that the cosine ends in")
    weight_decay_end: NonNegative | None = Field(
        None, description="what optim.weight_decay becomes by a cosine over the run; none leaves it constant"
    )

    def length(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch))


class Compute(Frozen):
    """Device and arithmetic of a worker."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = Field(
        "bf16", description="bf16 and fp16 are autocast over fp32 weights; fp16 scales the loss"
    )
    channels_last: bool = True
    compile: bool = Field(False, description="compile the family's embedding with torch.compile")
    threads: Count | None = Field(None, description="CPU threads of a worker; none leaves torch's choice")
    deterministic: bool = Field(False, description="refuse operations whose results vary from run to run")


class Parallel(Frozen):
    """Workers of a run; each takes an equal slice of every global batch."""

    kind: Literal["ddp", "fsdp"] = Field(
        "ddp", description="each worker holds all weights and optimiser state, or fsdp: a shard of them"
    )
    shard: Literal["all", "host"] = Field(
        "all", description="workers that one set of fsdp's shards is spread over: all, or those of each host"
    )
    workers: Count = 1
    micro_batch: Count | None = Field(
        None, description="samples of a worker that are computed at once, at most: larger slices are accumulated"
    )
    cpus_per_worker: Positive = Field(1.0, description="CPUs that Ray reserves for a worker")
    sync_batchnorm: bool = Field(False, description="batch-norm statistics over all workers, not each worker's own")
    min_workers: Count | None = Field(
        None,
        description="fewest workers that the run goes on with while there is no room for all; none: all or nothing",
    )
    max_crashes: Annotated[int, Field(ge=0)] = Field(
        2, description="restarts after an error of the code, before a newer checkpoint allows as many again"
    )
    max_lost: Annotated[int, Field(ge=0)] = Field(
        50, description="restarts after lost workers, nodes or storage, before a newer checkpoint allows as many again"
    )
    hang_minutes: Positive = Field(
        10.0, description="how long a worker may make no progress before it ends itself, with its threads' stacks"
    )
    start_minutes: Positive = Field(10.0, description="how long the run waits for room for its workers")

    @model_validator(mode="after")
    def _check_workers(self) -> Parallel:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than workers={self.workers}: lower it, or raise workers"
            )
        return self


class Eval(Frozen):
    """Frozen-feature evaluation: linear probe and k-NN, beside raw pixels and the encoder at random weights."""

    every: StepInterval | None = Field(None, description="validation probe during training; none: only at the end")
    weight_ema: Fraction | None = Field(None, description="momentum of the averaged weights that are evaluated")
    batch_size: Count = Field(256, description="images of one feature-extraction batch in a worker")
    probe_c: Positive = Field(1.0, description="inverse L2 strength of the probe, as in scikit-learn")
    knn_k: Count = 20
    knn_temperature: Positive = 0.07
    labels_per_class: tuple[Count, ...] = Field((), description="few-label probes to report, such as [1, 5, 10]")
    label_draws: Annotated[int, Field(ge=2)] = Field(100, description="label draws that few-label probes average")
    report: bool = Field(
        True, description="score the test split at the end and register the encoder; false: the validation split alone"
    )


class Checkpoint(Frozen):
    """Full training state for resuming, and snapshots of the encoder alone."""

    every: Interval = "5 minutes"
    keep_last: Count = Field(2, description="newest checkpoints that stay")
    keep_best: Annotated[int, Field(ge=0)] = Field(
        0, description="checkpoints that stay beside them for the best validation probe at or before their step"
    )
    patience_minutes: NonNegative = Field(
        10.0, description="how long storage may be away or full before the run stops; it trains on meanwhile"
    )
    on_stop: bool = Field(True, description="write a checkpoint when the run is asked to stop")
    allow_changes: tuple[str, ...] = Field(
        (), description="settings, such as optim.lr or schedule, that may differ from those of the resumed checkpoint"
    )
    snapshot_every: Interval | None = Field(None, description="keep the encoder's weights this often")


class Tracking(Frozen):
    """What MLflow is told."""

    experiment: str = Field("tessera", min_length=1)
    model: str | None = Field(
        None, pattern=r"^[\w.-]+$", description="registered model name; none takes the recipe's name"
    )
    log_every: StepInterval = "10 steps"


class Monitor(Frozen):
    """Quality of representations during training, and alarms that name a cure."""

    every: StepInterval | None = Field("100 steps", description="how often representations are measured; none: never")
    rows: Annotated[int, Field(ge=2)] = Field(
        512, description="embeddings of a measurement over all views and workers, from the last steps if one has fewer"
    )
    alarms: bool = Field(True, description="tell what goes wrong, and its cure, when it begins and when it ends")
    patience: Count = Field(3, description="measurements in a row that raise an alarm; a better one ends it")
    min_variance: NonNegative = Field(0.01, description="mean variance of the dimensions below which they collapse")
    max_correlation: Fraction = Field(0.5, description="mean absolute correlation of two dimensions that is too much")
    stop_on_collapse: bool = Field(False, description="end the run, as failed, when a representation has collapsed")

    @model_validator(mode="after")
    def _check(self) -> Monitor:
        if self.stop_on_collapse and (self.every is None or not self.alarms):
            raise ValueError(
                f"stop_on_collapse=true needs measurements and alarms, and every={self.every}, alarms={self.alarms}: "
                "set every and alarms=true"
            )
        return self


class Guard(Frozen):
    """Steps that are not taken, and losses that leap."""

    nonfinite: Literal["skip", "stop"] = Field(
        "skip", description="a step whose gradient is not finite is left out, or ends the run"
    )
    max_skipped: Count = Field(10, description="left-out steps since the newest checkpoint that end the run")
    max_skipped_in_a_row: Count = Field(3, description="left-out steps in a row that end the run")
    spike: Literal["none", "alarm", "stop"] = Field("alarm", description="what a loss that leaps does")
    spike_deviations: Positive = Field(
        8.0, description="height of a leap above the median of the last 100 logged losses, in robust deviations"
    )


_OF_THE_READER = ("uri", "mode", "resident_gb", "cache_gb", "deadline_minutes", "prefetch", "workers")


class RunConfig(Frozen):
    """Everything that decides what a run computes."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="recipe name; first part of the run's name")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    repeat: Annotated[int, Field(ge=0)] = Field(0, description="number of a repetition; changes the run's name alone")
    data: Data
    family: Family
    init_from: str | None = Field(
        None,
        min_length=1,
        description="weights to start from: folder or s3:// address of a kept encoder, or a timm .safetensors file",
    )
    optim: Optim = Lars()  # pyright: ignore[reportCallIssue]
    schedule: Schedule = Schedule()  # pyright: ignore[reportCallIssue]
    compute: Compute = Compute()  # pyright: ignore[reportCallIssue]
    parallel: Parallel = Parallel()  # pyright: ignore[reportCallIssue]
    eval: Eval = Eval()  # pyright: ignore[reportCallIssue]
    checkpoint: Checkpoint = Checkpoint()  # pyright: ignore[reportCallIssue]
    tracking: Tracking = Tracking()  # pyright: ignore[reportCallIssue]
    monitor: Monitor = Monitor()  # pyright: ignore[reportCallIssue]
    guard: Guard = Guard()  # pyright: ignore[reportCallIssue]

    def identity(self) -> dict[str, Any]:
        """Settings that decide what is computed: without where things lie and how, and by how many, it is carried out.

        Batch norm that is not synchronised is the exception: its statistics are those of a worker's slice.
        """
        tree = self.plain()
        del tree["init_from"], tree["checkpoint"], tree["guard"], tree["compute"]["threads"]
        tree["parallel"] = {"sync_batchnorm": self.parallel.sync_batchnorm}
        tree["data"] = {name: value for name, value in tree["data"].items() if name not in _OF_THE_READER}
        return tree

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        self.slice_of(self.parallel.workers)
        batch = self.data.batch_size
        partitions = canonical_partitions(self.data.partitions, batch)
        fewest = self.parallel.min_workers or self.parallel.workers
        self.slice_of(next(n for n in range(fewest, partitions + 1) if partitions % n == 0))
        self._check_mixing(batch // partitions)
        if self.guard.spike == "stop" and not self.monitor.alarms:
            raise ValueError(
                "guard.spike=stop acts on an alarm, and monitor.alarms=False raises none: set monitor.alarms=true"
            )
        unknown = sorted(set(self.optim.weight_decay_of) - set(self.family.components))
        if unknown:
            raise ValueError(
                f"optim.weight_decay_of.{unknown[0]} names no trained component of family {self.family.kind!r}: "
                f"use {' or '.join(self.family.components)}"
            )
        if self.schedule.min_lr > self.optim.lr or self.schedule.start_lr > self.optim.lr:
            raise ValueError(
                f"schedule.start_lr={self.schedule.start_lr} and schedule.min_lr={self.schedule.min_lr} "
                f"must not exceed optim.lr={self.optim.lr}: raise optim.lr or lower them"
            )
        return self

    def slice_of(self, workers: int) -> int:
        """Samples of a step that each of so many workers takes: any number that may take them gives the same run.

        Raises:
            ValueError: they cannot share the batch, or batch norm would see a part where it is to see the slice.
        """
        size, most = _slice(self.data, workers), self.parallel.micro_batch
        for name, instead in (("encoder", "group"), ("projector", "layer")):
            if most is not None and most < size and getattr(getattr(self.family, name, None), "norm", None) == "batch":
                raise ValueError(
                    f"parallel.micro_batch={most} cuts the {size} samples that each of {workers} workers has, and "
                    f"with family.{name}.norm=batch batch norm would normalise each part by itself: use "
                    f"family.{name}.norm={instead}, or parallel.micro_batch=null"
                )
        return size

    def _check_mixing(self, per_partition: int) -> None:
        if not self.data.augment.mixes:
            return
        if per_partition < 2:
            raise ValueError(
                f"data.augment.mixup and cutmix need two samples of a partition in a step, and data.partitions="
                f"{self.data.partitions} leaves one of data.batch_size={self.data.batch_size}: lower data.partitions"
            )
        for name in ("loss", "regulariser"):
            if getattr(getattr(self.family, name, None), "kind", None) == "nt_xent":
                raise ValueError(
                    f"data.augment.mixup and cutmix with family.{name}.kind=nt_xent: it pushes a sample away from all "
                    "others, and a mixed one is partly another: set both to 0, or take another loss"
                )

    @model_validator(mode="after")
    def _check_views(self) -> RunConfig:
        if self.init_from is not None and self.init_from.startswith("models:"):
            raise ValueError(
                f"init_from={self.init_from} is a name in MLflow: give the folder `encoder` in the storage of the run "
                "that trained it"
            )
        if self.data.local is not None and not self.family.takes_local_crops:
            raise ValueError(
                f"data.local gives family {self.family.kind} local crops, which it has no use for: "
                "leave data.local out, or choose another family, such as image_vicreg"
            )
        encoder = self.family.encoder
        sides = {"image_size": self.data.image_size, "eval_image_size": self.data.eval_image_size}
        if self.data.local is not None:
            sides["local.size"] = self.data.local.size
        for name, side in sides.items():
            if isinstance(encoder, ViT) and side % encoder.patch_size:
                raise ValueError(f"family.encoder.patch_size={encoder.patch_size} does not divide data.{name}={side}")
        self.family.check(self.data)
        if self.parallel.hang_minutes <= self.data.deadline_minutes:
            raise ValueError(
                f"parallel.hang_minutes={self.parallel.hang_minutes:g} would end workers that wait for their data, for "
                f"data.deadline_minutes={self.data.deadline_minutes:g} at most: raise the one or lower the other"
            )
        return self


def changed_settings(then: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted settings of what is computed in which two configs differ, with both values; runs' names do not count."""
    before, after = (_dotted(config.identity()) for config in (then, now))
    names = sorted((before.keys() | after.keys()) - {"name", "repeat"})
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _slice(data: Data, workers: int) -> int:
    """Samples of a step that each of so many workers takes: whole canonical partitions."""
    batch, partitions = data.batch_size, canonical_partitions(data.partitions, data.batch_size)
    if partitions % workers == 0:
        return batch // workers
    numbers = [n for n in range(1, partitions + 1) if partitions % n == 0]
    near = {max(n for n in numbers if n < workers), *[n for n in numbers if n > workers][:1]}
    found = f"parallel.workers={' or '.join(map(str, sorted(near)))}"
    if workers <= data.partitions:
        sizes = (batch + sign * distance for distance in range(batch + workers) for sign in (-1, 1))
        fits = (b for b in sizes if b > 0 and canonical_partitions(data.partitions, b) % workers == 0)
        found += f", or data.batch_size={next(fits)}"
    else:
        found += ", or raise data.partitions"
    raise ValueError(
        f"parallel.workers={workers} must divide the {partitions} canonical partitions (data.partitions="
        f"{data.partitions} lowered until it divides data.batch_size={batch}), so that every number of workers takes "
        f"the same batches: use {found}"
    )


def canonical_partitions(wanted: int, batch_size: int) -> int:
    """Lower `wanted` until it divides `batch_size`; at least 1."""
    return next(p for p in range(min(wanted, batch_size), 0, -1) if batch_size % p == 0)
