"""Training from a CfgNode: Detectron2's DefaultTrainer with what grounding needs."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from fiber_d2.config import keyword_arguments
from fiber_d2.data import build_test_loader, build_train_loader
from fiber_d2.evaluation import build_evaluator

from .best import BestCheckpoint, check_best_metric
from .checkpointer import FiberCheckpointer
from .evaluate import EvaluationOptions, TestSet, check_test_sets, evaluate_test_sets
from .final_test import FOLDER, run_final_test
from .precision import choose_amp_dtype
from .resolve import resolve_config
from .solver import build_param_groups, build_scheduler
from .start_check import RunPlan, start_check
from .step import StepTrainer
from .train import distribute, restore_random_state, set_up
from .training_hooks import TrainingOptions, build_training_hooks
from .trouble import name_the_iteration
from .tuning import apply_tuning

logger = logging.getLogger(__name__)

# Images drawn per test set.
PICTURES = 12
# SOLVER.CLIP_GRADIENTS.CLIP_TYPE for the norm of all gradients together; Detectron2 knows
# "value" and "norm" only, both for each parameter by itself.
FULL_MODEL = "full_model"


class FiberTrainer(DefaultTrainer):
    """DefaultTrainer whose data, optimiser, step and checkpoints are those of this project.

    Works without a GPU, in one process or several, with mixed precision or without.
    """

    def __init__(self, cfg: CfgNode, options: EvaluationOptions | None = None) -> None:
        # Not DefaultTrainer's own constructor: in Detectron2 0.6 it needs GPUs for mixed
        # precision, and its training loader cannot start in the middle.
        TrainerBase.__init__(self)
        self.options = TrainingOptions.of_cfg_node(cfg)
        model = self.build_model(cfg)
        apply_tuning(model, cfg.FIBER.TRAIN.TUNING or None)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        full_model = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = StepTrainer(
            distribute(
                model,
                accumulate=self.options.accumulate,
                **keyword_arguments(cfg.FIBER.TRAIN.DDP),
            ),
            optimizer,
            amp_dtype=choose_amp_dtype(cfg.MODEL.DEVICE) if cfg.SOLVER.AMP.ENABLED else None,
            clip_grad=clip.CLIP_VALUE if full_model else None,
            log_period=self.options.log_period,
            accumulate=self.options.accumulate,
            max_nonfinite=self.options.max_nonfinite,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = FiberCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._evaluation_options = options or EvaluationOptions(pictures=PICTURES)
        self._random_states: list[Any] = []
        self.best: BestCheckpoint | None = None
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        resuming = resume and self.checkpointer.can_resume()
        rest = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resuming:
            self.start_iter = self.iter + 1
            self._random_states = rest.get("random_states", [])

    def build_hooks(self) -> list[Any]:
        cfg = self.cfg
        test_sets = self.build_test_sets(cfg)
        check_best_metric(self.options.best, cfg.DATASETS.TEST)
        final_cfg = cfg.clone()
        final_cfg.defrost()
        final_cfg.DATASETS.TEST = tuple(self.options.test_best)
        final_cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, FOLDER)
        self._final_sets = self.build_test_sets(final_cfg)
        if self._evaluation_options.self_check:
            check_test_sets([*test_sets, *self._final_sets])

        def evaluate() -> dict[str, Any]:
            self._last_eval_results = evaluate_test_sets(
                self.model,
                test_sets,
                output_dir=cfg.OUTPUT_DIR,
                options=self._evaluation_options,
                checkpoint=f"{cfg.OUTPUT_DIR}, iteration {self.iter}",
                weights=self.options.weights,
                storage=self.storage,
            )
            return self._last_eval_results

        made = build_training_hooks(
            self.options,
            step=self._trainer,
            model=self.checkpointer.model,
            checkpointer=self.checkpointer,
            scheduler=self.scheduler,
            evaluate=evaluate,
            tokenizer=cfg.FIBER.TOKENIZER,
        )
        self.best = made.best
        return made.all

    def train(self) -> Any:
        """Train, and test the best checkpoint on ``FIBER.TRAIN.TEST_BEST``.

        Returns:
            The results of the last evaluation, in the main process.
        """
        if self.best is not None and self.best.stopped:
            logger.info("Training has ended before: %s", self.best.stopped)
        else:
            self._train()
        if self.best is not None:
            run_final_test(
                self.best,
                self.checkpointer.model,
                self.options.test_best,
                self._evaluate_best,
                os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth"),
                weights=self.options.weights,
            )
        return getattr(self, "_last_eval_results", None)

    def _evaluate_best(self, path: str) -> dict[str, Any]:
        return evaluate_test_sets(
            self.checkpointer.model,
            self._final_sets,
            output_dir=os.path.join(self.cfg.OUTPUT_DIR, FOLDER),
            options=self._evaluation_options,
            checkpoint=path,
            weights=self.options.weights,
        )

    def _train(self) -> None:
        self.data_loader = self.build_train_loader(self.cfg, start_index=self.start_iter)
        if self.options.start_check:
            plan = RunPlan(
                self.start_iter,
                self.max_iter,
                schedule=self.scheduler,
                averaged=self.options.ema is not None,
                bucket_views=self.cfg.FIBER.TRAIN.DDP.GRADIENT_AS_BUCKET_VIEW,
            )
            start_check(self._trainer, self.data_loader, plan)
        self._trainer.start_loading()
        restore_random_state(self._random_states)
        try:
            with name_the_iteration(self, self.max_iter):
                super().train()
        finally:
            self._trainer.stop_loading()

    def run_step(self) -> None:
        step = self._trainer
        step.iter, step.max_iter, step.storage = self.iter, self.max_iter, self.storage
        step.run_step()

    def flush_metrics(self) -> None:
        """Record the losses since the last look at them."""
        self._trainer.flush_metrics()

    def state_dict(self) -> dict[str, Any]:
        # DefaultTrainer of Detectron2 0.6 leaves the optimiser out.
        state = TrainerBase.state_dict(self)
        state["_trainer"] = self._trainer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW with the rates and decays of ``cfg.SOLVER``."""
        solver = cfg.SOLVER
        params = build_param_groups(cfg, model)
        optimizer = torch.optim.AdamW
        if solver.CLIP_GRADIENTS.CLIP_TYPE != FULL_MODEL:
            optimizer = maybe_add_gradient_clipping(cfg, optimizer)
        # On GPUs it then learns by itself whether the gradients are finite.
        fused = next(model.parameters()).is_cuda or None
        return optimizer(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=fused)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """What ``SOLVER.LR_SCHEDULER_NAME`` names, see :mod:`fiber_d2.engine.solver`."""
        return build_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_index: int = 0) -> Iterable[Any]:
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty: name at least one data set.")
        return build_train_loader(
            datasets=list(cfg.DATASETS.TRAIN),
            tokenizer=cfg.FIBER.TOKENIZER,
            augmentations=build_augmentation(cfg, is_train=True),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            # All processes have to agree on the order of the images.
            seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            start_index=start_index,
            accumulate=cfg.FIBER.TRAIN.ACCUMULATE,
            max_tokens=cfg.FIBER.MAX_TOKENS,
            separator=cfg.FIBER.SEPARATOR,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
            image_format=cfg.INPUT.FORMAT,
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
        return build_test_loader(
            dataset=dataset_name,
            tokenizer=cfg.FIBER.TOKENIZER,
            augmentations=build_augmentation(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            max_tokens=cfg.FIBER.MAX_TOKENS,
            separator=cfg.FIBER.SEPARATOR,
            image_format=cfg.INPUT.FORMAT,
        )

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def build_test_sets(cls, cfg: CfgNode) -> list[TestSet]:
        """The data sets of ``DATASETS.TEST`` with their loaders and evaluators."""
        return [
            TestSet(
                name,
                cls.build_test_loader(cfg, name),
                cls.build_evaluator(cfg, name),
                cfg.FIBER.TOKENIZER,
                {
                    "tokenizer": cfg.FIBER.TOKENIZER,
                    "max_tokens": cfg.FIBER.MAX_TOKENS,
                    "separator": cfg.FIBER.SEPARATOR,
                    "dataset_prompts": True,
                    "image_format": cfg.INPUT.FORMAT,
                    "augmentations": [str(x) for x in build_augmentation(cfg, is_train=False)],
                },
            )
            for name in cfg.DATASETS.TEST
        ]

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Any = None,
        *,
        options: EvaluationOptions | None = None,
        checkpoint: str = "",
        resumable: bool = False,
    ) -> dict[str, Any]:
        """Per data set of ``DATASETS.TEST`` the results, in the main process.

        Args:
            checkpoint: where the weights are from, for the protocol; "" is ``MODEL.WEIGHTS``.
        """
        options = options or EvaluationOptions(pictures=PICTURES)
        test_sets = cls.build_test_sets(cfg)
        if evaluators is not None:
            evaluators = [evaluators] if isinstance(evaluators, DatasetEvaluator) else evaluators
            if len(evaluators) != len(test_sets):
                raise ValueError(
                    f"{len(evaluators)} evaluators for the {len(test_sets)} data sets of "
                    "DATASETS.TEST: give one for each."
                )
            test_sets = [
                replace(known, evaluator=evaluator)
                for known, evaluator in zip(test_sets, evaluators)
            ]
        if options.self_check:
            check_test_sets(test_sets)
        return evaluate_test_sets(
            model,
            test_sets,
            output_dir=cfg.OUTPUT_DIR,
            options=options,
            checkpoint=checkpoint or cfg.MODEL.WEIGHTS,
            weights=cfg.FIBER.TRAIN.WEIGHTS,
            resumable=resumable,
        )


def run_cfg_node(
    cfg: CfgNode,
    *,
    resume: bool = False,
    eval_only: bool = False,
    options: EvaluationOptions | None = None,
) -> None:
    """The whole program for a CfgNode, in each of its processes.

    Args:
        resume: continue from the last checkpoint in ``OUTPUT_DIR`` where there is one.
        eval_only: evaluate ``MODEL.WEIGHTS`` (with ``resume`` the last checkpoint).
        options: of evaluations; None for the defaults with pictures.
    """
    set_up(cfg.OUTPUT_DIR, seed=cfg.SEED)
    resolve_config(cfg, eval_only=eval_only)
    if comm.is_main_process():
        with open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
            file.write(cfg.dump())
    if not eval_only:
        trainer = FiberTrainer(cfg, options)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return
    if not cfg.DATASETS.TEST:
        raise ValueError("There is nothing to evaluate: DATASETS.TEST is empty.")
    model = FiberTrainer.build_model(cfg)
    if not cfg.MODEL.WEIGHTS and not resume:
        logger.warning("No checkpoint is given (MODEL.WEIGHTS): weights are random.")
    checkpointer = FiberCheckpointer(model, cfg.OUTPUT_DIR, weights=cfg.FIBER.TRAIN.WEIGHTS)
    path = checkpointer.checkpoint_to_evaluate(cfg.MODEL.WEIGHTS, resume=resume)
    checkpointer.load(path, checkpointables=[])
    FiberTrainer.test(cfg, model, options=options, checkpoint=path, resumable=True)
