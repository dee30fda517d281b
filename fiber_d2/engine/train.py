"""Training from a LazyConfig."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .best import check_best_metric
from .checkpointer import FiberCheckpointer
from .ema import weights_to_evaluate
from .evaluate import build_test_sets, check_test_sets, do_test
from .final_test import config_of_final_test, run_final_test
from .overrides import takes_argument
from .precision import choose_amp_dtype
from .randomness import set_random_state
from .report import RunSummary
from .resolve import resolve_config
from .scaling import lengths_from_epochs
from .start_check import RunPlan, start_check
from .step import StepTrainer
from .training_hooks import TrainingOptions, build_training_hooks
from .tuning import apply_tuning

logger = logging.getLogger(__name__)


def set_up(output_dir: str, *, seed: int, threads: int | None = None) -> None:
    """Loggers, seed and number of threads of a process; the environment, written down.

    Args:
        seed: process ``r`` uses ``seed + r``; negative draws one.
        threads: of torch on the CPU, per process; None leaves them as they are.
    """
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "fiber_d2"):
        setup_logger(output_dir, distributed_rank=rank, name=name, color=sys.stdout.isatty())
    if threads:
        torch.set_num_threads(threads)
    seed_all_rng(None if seed < 0 else seed + rank)
    if comm.is_main_process():
        # It warns of a CUDA toolkit on a machine without a GPU, which is no mistake.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        with open(os.path.join(output_dir, "environment.txt"), "w") as file:
            file.write(collect_env_info() + "\n")
        gpu = f"GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
        logger.info(
            "torch %s, %s, %d process(es) of %d CPU threads; output in %s",
            torch.__version__,
            gpu,
            comm.get_world_size(),
            torch.get_num_threads(),
            output_dir,
        )


def distribute(
    model: nn.Module,
    *,
    accumulate: int = 1,
    static_graph: bool = False,
    gradient_as_bucket_view: bool = True,
) -> nn.Module:
    """``model``, wrapped where there are several processes; on CPUs as well as on GPUs.

    Args:
        accumulate: batches of a step.
        static_graph: every step uses the same parameters in the same order; see docs/scaling.md.
        gradient_as_bucket_view: gradients live in the buffers that are sent, which saves a copy
            of them.

    Raises:
        ValueError: a static graph with several batches per step.
    """
    if comm.get_world_size() == 1:
        return model
    if static_graph and accumulate > 1:
        # torch learns the graph in the first backward pass and has to exchange gradients in it.
        raise ValueError(
            f"train.ddp.static_graph does not go with accumulate = {accumulate}: leave one of them "
            "out."
        )
    on_gpu = next(model.parameters()).is_cuda
    # Buffers are constants here. torch renamed the argument, and warns of the old name.
    names = inspect.signature(DistributedDataParallel).parameters
    argument = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if on_gpu else None,
        static_graph=static_graph,
        gradient_as_bucket_view=gradient_as_bucket_view,
        **{argument: False},
    )


def run_lazy_config(cfg: DictConfig, *, resume: bool = False, eval_only: bool = False) -> None:
    """The whole program for a LazyConfig, in each of its processes.

    ``cfg`` has the nodes ``model``, ``dataloader.{train,test,evaluator}``, ``optimizer``,
    ``lr_multiplier`` and ``train``, and may have ``register`` (a dict of nodes, called first, in
    every process, for one's own data sets; a plain list would not do, LazyConfig drops it),
    ``prepare`` (called next, by one process), ``report`` (makes the function called last) and
    ``summary`` (the same for evaluation only; it gets the results and the output folder).

    Args:
        resume: continue from the last checkpoint in ``train.output_dir`` where there is one.
        eval_only: evaluate ``train.init_checkpoint`` (with ``resume`` the last checkpoint).
    """
    started = time.perf_counter()
    if not eval_only and "optimizer" not in cfg:
        raise ValueError("This configuration only evaluates, it has no optimizer: add --eval-only.")
    set_up(cfg.train.output_dir, seed=cfg.train.seed, threads=cfg.train.get("threads"))
    resolve_config(cfg, eval_only=eval_only)
    if comm.is_main_process():
        LazyConfig.save(cfg, os.path.join(cfg.train.output_dir, "config.yaml"))
    register = cfg.get("register") or []
    for node in register.values() if isinstance(register, DictConfig) else register:
        instantiate(node)
    if comm.is_main_process() and "prepare" in cfg:
        instantiate(cfg.prepare)
    comm.synchronize()
    if eval_only:
        evaluate_only(cfg, resume=resume)
    else:
        do_train(cfg, resume=resume, started=started)


def evaluate_only(cfg: DictConfig, *, resume: bool = False) -> dict[str, dict[str, Any]]:
    """Evaluate a checkpoint; see :func:`run_lazy_config`. Returns results in the main process."""
    test_sets = build_test_sets(cfg)
    if not test_sets:
        raise ValueError("There is nothing to evaluate: dataloader.test is empty.")
    if cfg.train.get("self_check", True):
        check_test_sets(test_sets)
    model = instantiate(cfg.model).to(cfg.train.device)
    weights = cfg.train.get("weights", "model")
    checkpointer = FiberCheckpointer(model, cfg.train.output_dir, weights=weights)
    path = checkpointer.checkpoint_to_evaluate(cfg.train.init_checkpoint, resume=resume)
    if not path:
        logger.warning("No checkpoint is given (train.init_checkpoint): weights are random.")
    checkpointer.load(path, checkpointables=[])
    results = do_test(
        cfg, model, test_sets=test_sets, checkpoint=path, weights=weights, resumable=True
    )
    if "summary" in cfg and comm.is_main_process():
        instantiate(cfg.summary)(results, cfg.train.output_dir)
    return results


def do_train(
    cfg: DictConfig, *, resume: bool = False, started: float | None = None
) -> dict[str, dict[str, Any]]:
    """Train, evaluate, report; see :func:`run_lazy_config`.

    Everything that can be wrong with the configuration or the data is found before training.

    Args:
        started: ``time.perf_counter()`` of when the run began; None means now.

    Returns:
        The results of the last evaluation, in the main process.
    """
    started = time.perf_counter() if started is None else started
    train = cfg.train
    lengths_from_epochs(cfg)
    options = TrainingOptions.of(train)
    model = instantiate(cfg.model).to(train.device)
    apply_tuning(model, train.get("tuning"))
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("The model has %.2f M trainable parameters", num_parameters / 1e6)
    if comm.is_main_process():
        with open(os.path.join(train.output_dir, "model.txt"), "w") as file:
            file.write(f"{model}\n")
    trainer = StepTrainer(
        distribute(model, accumulate=options.accumulate, **train.get("ddp", {})),
        build_optimizer(cfg, model),
        amp_dtype=(
            choose_amp_dtype(train.device, train.amp.get("dtype")) if train.amp.enabled else None
        ),
        clip_grad=train.get("clip_grad"),
        log_period=train.log_period,
        accumulate=options.accumulate,
        max_nonfinite=options.max_nonfinite,
    )
    checkpointer = FiberCheckpointer(model, train.output_dir, trainer=trainer)
    test_sets = build_test_sets(cfg)
    check_best_metric(options.best, [test_set.name for test_set in test_sets])
    final_cfg = config_of_final_test(cfg)
    final_sets = build_test_sets(final_cfg)
    if train.get("self_check", True):
        check_test_sets([*test_sets, *final_sets])
    report = instantiate(cfg.report) if "report" in cfg else None
    final_checkpoint = os.path.join(train.output_dir, "model_final.pth")

    def evaluate() -> dict[str, dict[str, Any]]:
        where = f"{train.output_dir}, iteration {trainer.iter}"
        return do_test(
            cfg,
            model,
            test_sets=test_sets,
            checkpoint=where,
            weights=options.weights,
            storage=trainer.storage,
        )

    hooks = build_training_hooks(
        options,
        step=trainer,
        model=model,
        checkpointer=checkpointer,
        scheduler=instantiate(cfg.lr_multiplier),
        evaluate=evaluate,
        tokenizer=cfg.dataloader.train.get("tokenizer"),
    )
    trainer.register_hooks(hooks.all)
    start_iter, random_states = start_or_resume(checkpointer, trainer, train, resume)
    stopped = hooks.best.stopped if hooks.best is not None else ""
    if start_iter < train.max_iter and not stopped:
        trainer.data_loader = build_train_loader(cfg, start_iter, accumulate=options.accumulate)
        if options.start_check:
            plan = RunPlan(
                start_iter,
                train.max_iter,
                schedule=instantiate(cfg.lr_multiplier),
                averaged=options.ema is not None,
                bucket_views=train.get("ddp", {}).get("gradient_as_bucket_view", True),
            )
            start_check(trainer, trainer.data_loader, plan)
        trainer.start_loading()
        restore_random_state(random_states)
        trainer.train(start_iter, train.max_iter)
        results = hooks.evaluation.results
        iterations = hooks.evaluation.last_iteration + 1
    else:
        done = f"Training has ended before: {stopped}" if stopped else "All iterations are done"
        logger.info("%s; evaluation only", done)
        with weights_to_evaluate(options.weights, hooks.ema):
            results = do_test(
                cfg,
                model,
                test_sets=test_sets,
                checkpoint=final_checkpoint,
                weights=options.weights,
            )
        iterations = start_iter
        if hooks.best is not None:
            hooks.best.finish(start_iter - 1, results)
    if report is not None and comm.is_main_process():
        report(
            RunSummary(
                results=results,
                output_dir=train.output_dir,
                checkpoint=final_checkpoint,
                seed=train.seed,
                num_parameters=num_parameters,
                iterations=iterations,
                train_seconds=hooks.clock.seconds,
                total_seconds=time.perf_counter() - started,
                best=hooks.best.summary() if hooks.best is not None else None,
            )
        )
    if hooks.best is not None:
        # Last, as it replaces the weights of the model.
        run_final_test(
            hooks.best,
            model,
            options.test_best,
            lambda path: do_test(
                final_cfg,
                model,
                test_sets=final_sets,
                checkpoint=path,
                weights=options.weights,
            ),
            final_checkpoint,
            weights=options.weights,
        )
    return results


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``cfg.optimizer``, whose node ``params`` lacks only the model."""
    node = copy.deepcopy(cfg.optimizer)
    node.params.model = model
    on_gpu = next(model.parameters()).is_cuda
    plain = OmegaConf.to_container(node, resolve=False)
    if on_gpu and takes_argument(plain, "fused") and not {"fused", "foreach"} & plain.keys():
        # It learns on the GPU whether the gradients are finite; others make the host wait.
        node.fused = True
    return instantiate(node)


def build_train_loader(cfg: DictConfig, start_iter: int, *, accumulate: int = 1) -> Any:
    """The loader of ``cfg.dataloader.train``, from the batch of iteration ``start_iter`` on.

    Args:
        accumulate: batches of an iteration. The loader gets them by that name where it can, and
            then counts in iterations; any other one counts in batches.
    """
    node = copy.deepcopy(cfg.dataloader.train)
    plain = OmegaConf.to_container(node, resolve=False)
    if takes_argument(plain, "accumulate"):
        node.accumulate = accumulate
    else:
        start_iter *= accumulate
    if takes_argument(plain, "start_index"):
        node.start_index = start_iter
    elif start_iter:
        logger.warning(
            "The training loader takes no start_index: it starts over, and images the interrupted "
            "run has seen come again."
        )
    return instantiate(node)


def start_or_resume(
    checkpointer: FiberCheckpointer, trainer: StepTrainer, train: DictConfig, resume: bool
) -> tuple[int, list[Mapping[str, Any]]]:
    """Load what there is to load; the iteration to start with and the saved random states."""
    resuming = resume and checkpointer.can_resume()
    rest = checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    if not resuming:
        return 0, []
    # The checkpoint holds the iteration that was just done.
    logger.info("Resuming after iteration %d", trainer.iter)
    return trainer.iter + 1, rest.get("random_states", [])


def restore_random_state(states: list[Mapping[str, Any]]) -> None:
    """Put the random generators of this process where the interrupted run had them."""
    rank = comm.get_rank()
    if rank < len(states):
        set_random_state(dict(states[rank]))
    elif states:
        logger.warning("Process %d is new since the checkpoint: fresh random numbers", rank)
