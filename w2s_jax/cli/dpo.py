"""`w2s dpo`: preference optimisation of a decoder; DPO and its relatives, KTO, WSPO."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.cli.train import Training
from w2s_jax.cli.train_flags import Setup
from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from w2s_jax.cli.train import Rows
    from w2s_jax.models.config import ModelConfig
    from w2s_jax.models.model import Model
    from w2s_jax.text.batches import Data
    from w2s_jax.text.training_data import DataConfig
    from w2s_jax.train.objectives import Policy
    from w2s_jax.train.preference_config import PreferenceConfig
    from w2s_jax.train.run import Source
    from w2s_jax.train.step import LossFunction


@dataclass(frozen=True, kw_only=True)
class DPO(Training):
    """Tune a model on preferences: pairs of responses, or responses with labels (kto).

    The tuned model and the one it came from make a guide. The folder of the run gets model/ (a
    Hugging Face checkpoint, or a PEFT adapter), metrics.jsonl and checkpoints/. The same command
    goes on where it was stopped; SIGTERM saves first and exits with status 75.
    """

    loss_type: UseAppendAction[tuple[str, ...]] = ()
    """Loss, by TRL's names: sigmoid (the default), hinge, ipo, exo_pair, nca_pair, robust,
    bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sigmoid_norm, sft, orpo,
    cpo, simpo, genarm, kto, wspo. Given again, the weighted sum of several."""
    loss_weights: UseAppendAction[tuple[float, ...]] = ()
    """Weight of each loss, 1 by default."""
    beta: float = 0.1
    """Strength of the pull to the reference; tau in IPO, lambda in ORPO, gamma in WSPO."""
    label_smoothing: float = 0.0
    """Share of labels assumed flipped, or EXO's epsilon."""
    discopop_tau: float = 0.05
    """Temperature of DiscoPOP's mixing weight."""
    simpo_gamma: float = 0.5
    """Margin that SimPO asks for."""
    cpo_alpha: float = 1.0
    """Weight of CPO's next-token loss."""
    desirable_weight: float = 1.0
    """KTO's weight of desirable responses."""
    undesirable_weight: float = 1.0
    """KTO's weight of undesirable responses."""
    weight_column: Annotated[str | None, arg(metavar="NAME")] = None
    """Column of the pairs that says how much each counts in the loss, such as the confidence in
    it: the sum of weight × loss over the sum of the weights."""
    reference: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint of the reference; by default --model as it is at the start."""
    reference_logprobs: Literal["precomputed", "live"] = "precomputed"
    """Compute the reference's log-probs once, before the first step, and keep them; or in every
    step, with the reference in memory, as kto and wspo always do."""
    tuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """The guide's tuned model (wspo)."""
    untuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """The guide's untuned model (wspo)."""

    name: ClassVar[str] = "dpo"
    peak: ClassVar[float] = 1e-6

    @property
    def preference(self) -> "PreferenceConfig":
        """The losses and their options; InputError for what is unknown or out of range."""
        from w2s_jax.train.preference_config import PreferenceConfig

        values = {item.name: getattr(self, item.name) for item in fields(PreferenceConfig)}
        values["loss_type"] = self.loss_type or ("sigmoid",)
        values["loss_weights"] = self.loss_weights or None
        return PreferenceConfig(**values)

    def frozen_folders(self) -> dict[str, Path]:
        """The reference and the guide, where flags name them."""
        named = {"reference": self.reference, "tuned": self.tuned, "untuned": self.untuned}
        return {name: locate_checkpoint(path) for name, path in named.items() if path is not None}

    def check(self) -> None:
        """Raises InputError for flags that do not go together."""
        super().check()
        preference = self.preference
        wspo = "wspo" in preference.loss_type
        for flag in ("tuned", "untuned"):
            if wspo and getattr(self, flag) is None:
                raise InputError(f"--loss-type wspo needs --{flag}, a model of the guide")
            if not wspo and getattr(self, flag) is not None:
                raise InputError(f"--{flag} has no effect without --loss-type wspo")
        if "kto" in preference.loss_type and self.batch_size // max(self.accumulate, 1) < 2:
            raise InputError("--loss-type kto pairs responses of a batch; it needs 2 rows or more")
        if "kto" in preference.loss_type and self.eval_batch_size == 1:
            raise InputError("--loss-type kto pairs responses; --eval-batch-size 1 holds only one")
        sorting = [loss for loss in preference.loss_type if loss in ("aot", "aot_unpaired")]
        if sorting and self.weight_column is not None:
            raise InputError(
                f"--weight-column has no effect on --loss-type {sorting[0]}: it compares the "
                "sorted rewards of a batch, not pairs"
            )
        if self.reference is not None and not preference.needs_reference:
            names = " + ".join(preference.loss_type)
            raise InputError(f"--reference has no effect: {names} reads no reference")

    @property
    def reference_is_live(self) -> bool:
        """Whether steps run the reference: kto pairs responses anew, wspo needs every token."""
        alone = set(self.preference.loss_type) & {"kto", "wspo"}
        asked = self.reference_logprobs == "live"
        return self.preference.needs_reference and (asked or bool(alone))

    def data_options(self) -> dict[str, Any]:
        """The column of weights."""
        return super().data_options() | {"weight_column": self.weight_column}

    def load_data(self, config: "DataConfig", tokenizer: Any) -> "Data":
        """Pairs, or responses with labels (kto), or single responses (wspo)."""
        from w2s_jax.text import training_data

        kinds = {"kto": training_data.load_labelled, "wspo": training_data.load_sequences}
        load = kinds.get(self.preference.loss_type[0], training_data.load_pairs)
        return load(config, tokenizer)

    def read(self, setup: Setup) -> "tuple[Rows, Rows | None]":
        """As of all trainings; InputError for one held-out response that kto cannot pair."""
        data, held_out = super().read(setup)
        if "kto" in self.preference.loss_type and held_out is not None and len(held_out) == 1:
            raise InputError("--loss-type kto pairs responses, and only one is held out; take more")
        return data, held_out

    def objective(self, policy: "Policy") -> "LossFunction":
        """The loss that is trained."""
        from w2s_jax.train.objectives import preference_objective

        return preference_objective(policy, self.preference)

    def frozen(self, setup: Setup, model: "Model") -> "dict[str, Model]":
        """The base of adapters, a live reference, and for wspo the guide."""
        import jax
        import jax.numpy as jnp

        from w2s_jax.models.model import Model
        from w2s_jax.train.objectives import REFERENCE, TUNED, UNTUNED

        held = super().frozen(setup, model)
        if self.reference_is_live and (self.reference or self.continue_adapter):
            held[REFERENCE] = self.reference_model(setup, model)
        elif self.reference_is_live and not held:
            # The arrays of a model that is trained are given up in the first step.
            own = Model(model.config, jax.tree.map(jnp.copy, model.params))
            held[REFERENCE] = self.reference_model(setup, own)
        for role, path in ((TUNED, self.tuned), (UNTUNED, self.untuned)):
            if path is not None:
                held[role] = self.other_model(setup, path, role)
        return held

    def frozen_configs(self, setup: Setup) -> "dict[str, ModelConfig]":
        """The shapes of what `frozen` holds."""
        from w2s_jax.models.load import load_config
        from w2s_jax.train.objectives import REFERENCE

        held = super().frozen_configs(setup)
        folders = self.frozen_folders()
        if self.reference_is_live and (self.reference or self.continue_adapter or not held):
            held[REFERENCE] = setup.config
        return held | {
            role: load_config(folder)
            for role, folder in folders.items()
            if role != REFERENCE or self.reference_is_live
        }

    def batch_shapes(self, setup: Setup) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of a batch of the longest rows; but for wspo, two to an example."""
        kind = self.preference.loss_type[0]
        shapes = super().batch_shapes(setup)
        if kind == "wspo":
            return shapes
        rows = self.batch_size
        shapes = {name: ((rows, 2, setup.length), dtype) for name, (_, dtype) in shapes.items()}
        if kind == "kto":
            return shapes | {"labels": ((rows,), "bool")}
        if self.weight_column is not None:
            shapes["weights"] = ((rows,), "float32")
        if self.preference.needs_reference and not self.reference_is_live:
            shapes["reference"] = ((rows, 2), "float32")
        return shapes

    def referenced(
        self, setup: Setup, model: "Model", data: "Rows", held_out: "Rows | None"
    ) -> "tuple[Source, Source | None]":
        """The examples with their precomputed reference log-probs, where the loss reads them."""
        from w2s_jax.train.reference import Referenced, cached_logprobs, weights_identity

        if not self.preference.needs_reference or self.reference_is_live:
            return data, held_out
        reference = self.reference_model(setup, model)
        source = setup.checkpoint if self.reference is None else locate_checkpoint(self.reference)
        identity = f"{weights_identity(source)} {self.compute_dtype}"
        if self.from_scratch:
            identity = f"{setup.config!r} {self.seed} {self.compute_dtype}"
        rows = self.eval_batch_size or self.batch_size // self.accumulate

        def with_logprobs(source: "Rows") -> "Source":
            found = cached_logprobs(
                reference, source, rows=rows, cache=setup.cache, identity=identity, mesh=setup.mesh
            )
            return Referenced(source, found)

        return with_logprobs(data), None if held_out is None else with_logprobs(held_out)

    def reference_model(self, setup: Setup, model: "Model") -> "Model":
        """The reference in the dtype that is computed in: --reference, or the model as it is."""
        from w2s_jax.models.load import load_adapted
        from w2s_jax.models.model import Model
        from w2s_jax.train.step import cast

        if self.reference is None and self.continue_adapter:
            return load_adapted(setup.checkpoint, model, merged=False, mesh=setup.mesh)
        if self.reference is None:
            return Model(model.config, cast(model.params, self.compute_dtype))
        return self.other_model(setup, self.reference, "reference")

    def other_model(self, setup: Setup, path: str, role: str) -> "Model":
        """A frozen model that reads the same tokens; InputError where its vocabulary differs."""
        from w2s_jax.models.load import load_model
        from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary

        folder = locate_checkpoint(path)
        if not same_vocabulary(setup.tokenizer, load_tokenizer(folder)):
            raise InputError(
                f"--{role} {path} has another vocabulary than --model {self.model}; losses compare "
                "the log-probs of the same tokens"
            )
        model = load_model(folder, dtype=self.compute_dtype, mesh=setup.mesh)
        if model.config.max_positions < setup.length:
            raise InputError(
                f"--{role} {path} has {model.config.max_positions} positions, fewer than "
                f"--max-length {setup.length}"
            )
        return model


def locate_checkpoint(path: str) -> "Path":
    """The folder of a checkpoint; InputError where there is none."""
    from w2s_jax.models.huggingface import locate

    return locate(path)
