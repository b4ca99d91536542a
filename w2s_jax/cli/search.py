"""`w2s search`: a file of prompts in, one of responses out. The searching is in w2s_jax/search."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from w2s_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from w2s_jax.models.model import Model
    from w2s_jax.search import Guide, SearchConfig

# How a run is carried out, not what it computes: these may change when a journal is taken up again.
NOT_IN_FINGERPRINT = ("prompts", "output", "batch_size", "mesh", "config")


@dataclass(frozen=True)
class Search:
    """Find responses of a frozen policy, steered by a tuned and an untuned model.

    Finished rows go to OUTPUT.journal at once. After a kill the same command goes on where it
    stopped; at the end the journal becomes the output, in input order.
    """

    policy: Annotated[str, arg(metavar="DIR|ID")]
    """Checkpoint that writes: a folder, or an id on the Hugging Face hub."""
    prompts: Annotated[str, arg(metavar="FILE")]
    """Input rows, JSON lines with a "prompt" each; .gz and .xz are read too."""
    output: Annotated[str, arg(metavar="FILE")]
    """Output rows: prompt, response, score, hypotheses, and the other input fields."""
    tuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint of the guide's tuned model; every method but sample needs it."""
    untuned: Annotated[str | None, arg(metavar="DIR|ID")] = None
    """Checkpoint of the guide's untuned model; every method but sample needs it."""
    method: Literal["cbs", "bon", "eft", "sample"] = "cbs"
    """Chunk-level beam search, best-of-N, emulated fine-tuning, or plain sampling."""
    beam_width: Annotated[int, arg(aliases=["--w"])] = 4
    """W, hypotheses kept (cbs)."""
    successors: Annotated[int, arg(aliases=["--k"])] = 4
    """K, successors sampled from each hypothesis (cbs)."""
    chunk_length: Annotated[int, arg(aliases=["--l"])] = 5
    """L, tokens in a chunk (cbs)."""
    samples: Annotated[int, arg(aliases=["--n"])] = 16
    """N, whole responses to choose from (bon)."""
    beta: float = 1.0
    """Weight of tuned − untuned logits (eft)."""
    max_new_tokens: int = 50
    """Tokens in a response at most."""
    temperature: float = 0.7
    """Sampling temperature; 0 is greedy."""
    top_k: int = 50
    """Sample from the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Sample from the likeliest tokens of this mass; 1 is off."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """A string that ends a response and is not part of it."""
    seed: int = 0
    """With a row's place in the input, decides its draws."""
    batch_size: int = 8
    """Prompts searched side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; auto is as stored, but float32 on a CPU, where it is faster."""
    mesh: Annotated[str | None, arg(metavar="SPEC")] = None
    """Device mesh such as data=2,tensor=4; one axis may be -1."""
    reference_quirks: bool = False
    """Do as the published PyTorch code does where it differs from the paper."""
    config: Annotated[str | None, arg(metavar="FILE|NAME")] = None
    """YAML values of these flags, by file or by the name of a built-in one; flags override them."""

    def run(self) -> None:
        """Search all rows; raises InputError, before any weight is read, for what is wrong."""
        from tqdm import tqdm

        from w2s_jax.models.huggingface import load_config
        from w2s_jax.ops.sharding import make_mesh
        from w2s_jax.search.files import check_lengths, encode_rows, search_rows
        from w2s_jax.text.journal import held, journal_path, open_journal
        from w2s_jax.text.prompts import special_stops
        from w2s_jax.text.rows import check_writable, read_jsonl

        config = self.search_config()
        checkpoints = self.checkpoints()
        if Path(self.prompts).resolve() == Path(self.output).resolve():
            raise InputError(f"--output {self.output} is the file of prompts; name another")
        rows = read_jsonl(self.prompts)
        check_writable(self.output)
        models = {role: load_config(path) for role, path in checkpoints.items()}
        tokenizer = load_one_vocabulary(checkpoints)
        prompts = encode_rows(tokenizer, rows, self.prompts)
        check_lengths(prompts, config.max_new_tokens, models, self.prompts)
        mesh = make_mesh(self.mesh) if self.mesh else None
        texts, ids = special_stops(tokenizer, self.stop)
        eos_ids = (*models["policy"].eos_ids, *ids)
        slots = min(self.batch_size, len(rows))
        config = replace(config, stop=texts, eos_ids=eos_ids, slots=slots)
        with held(journal_path(self.output)):
            journal = open_journal(journal_path(self.output), self.fingerprint(rows))

            waiting = len(rows) - len(journal.read())
            started = time.monotonic()
            if waiting:
                policy, guide = self.load(mesh)
                done = len(rows) - waiting
                with tqdm(total=len(rows), initial=done, unit="prompt", disable=None) as bar:
                    job = (tokenizer, rows, config, journal)
                    search_rows(policy, guide, *job, prompts=prompts, on_row=bar.update, mesh=mesh)
            seconds = time.monotonic() - started
            journal.merge(self.output, len(rows))
            print(f"{self.output}: {len(rows)} rows, {waiting} of them in {seconds:.1f} s")

    def search_config(self) -> "SearchConfig":
        """The search these flags describe; InputError for a value out of range."""
        from w2s_jax.ops.sampling import Sampling
        from w2s_jax.search.presets import preset

        sizes = {
            "--w": self.beam_width,
            "--k": self.successors,
            "--l": self.chunk_length,
            "--n": self.samples,
            "--max-new-tokens": self.max_new_tokens,
            "--batch-size": self.batch_size,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise InputError(f"{flag} is {size}; it must be at least 1")
        return preset(
            self.method,
            w=self.beam_width,
            k=self.successors,
            l=self.chunk_length,
            n=self.samples,
            beta=self.beta,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_k, self.top_p),
            stop=self.stop,
            seed=self.seed,
            slots=self.batch_size,
            reference_quirks=self.reference_quirks,
        )

    def checkpoints(self) -> dict[str, str]:
        """Checkpoints by role; InputError where the method needs one that is not given."""
        given = {"policy": self.policy, "tuned": self.tuned, "untuned": self.untuned}
        missing = [f"--{role}" for role, path in given.items() if path is None]
        if self.method == "sample":
            return {"policy": self.policy}
        if missing:
            raise InputError(f"--method {self.method} needs {' and '.join(missing)}")
        return {role: path for role, path in given.items() if path is not None}

    def fingerprint(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What the rows of a journal depend on: flags, the input rows, the checkpoints' files."""
        flags = {
            flag: value for flag, value in asdict(self).items() if flag not in NOT_IN_FINGERPRINT
        }
        folders = {
            role: Path(path).resolve()
            for role, path in self.checkpoints().items()
            if Path(path).is_dir()
        }
        files = {f"{role}_files": weights_stamp(folder) for role, folder in folders.items()}
        paths = {role: str(folder) for role, folder in folders.items()}
        content = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return flags | paths | files | {"prompts_sha256": content[:16]}

    def load(self, mesh: "Mesh | None") -> tuple["Model", "Guide | None"]:
        """The policy, and the guide if the method has one; a checkpoint named twice loads once."""
        import jax

        from w2s_jax.models.huggingface import load_model
        from w2s_jax.search import Guide

        stored_but_on_cpu = "float32" if jax.default_backend() == "cpu" else None
        dtype = stored_but_on_cpu if self.dtype == "auto" else self.dtype
        checkpoints = self.checkpoints()
        models = {
            path: load_model(path, dtype=dtype, mesh=mesh) for path in set(checkpoints.values())
        }
        policy = models[checkpoints["policy"]]
        if self.method == "sample":
            return policy, None
        return policy, Guide(models[checkpoints["tuned"]], models[checkpoints["untuned"]])


def weights_stamp(folder: Path) -> str:
    """A short hash of the names, sizes and times of a checkpoint's files."""
    files = sorted((*folder.glob("*.json"), *folder.glob("*.safetensors")))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def load_one_vocabulary(checkpoints: dict[str, str]) -> Any:
    """The policy's tokenizer; InputError where another checkpoint's maps tokens differently."""
    from w2s_jax.text.tokenizer import load_tokenizer, same_vocabulary

    tokenizers = {role: load_tokenizer(path) for role, path in checkpoints.items()}
    policy = tokenizers["policy"]
    for role, tokenizer in tokenizers.items():
        if not same_vocabulary(policy, tokenizer):
            raise InputError(
                f"--policy {checkpoints['policy']} and --{role} {checkpoints[role]} have different "
                f"vocabularies ({len(policy)} and {len(tokenizer)} tokens); search needs one"
            )
    return policy
