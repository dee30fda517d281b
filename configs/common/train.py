"""Run settings that every LazyConfig shares; see fiber_d2.engine.train.run_lazy_config."""

train = dict(
    output_dir="./output",
    # Weights to start from, or to evaluate with --eval-only; "" starts from random ones.
    init_checkpoint="",
    max_iter=90000,
    # Iterations between two evaluations; 0 evaluates at the end only.
    eval_period=5000,
    log_period=20,
    checkpointer=dict(period=5000, max_to_keep=3),
    # The length as passes through the training images, counted before training starts; it replaces
    # max_iter. eval_epochs, passes between two evaluations, replaces the periods.
    epochs=None,
    eval_epochs=None,
    # The images per step that rates and lengths of a recipe are for. Another batch size is warned
    # of; the rule "linear" or "sqrt" adapts them, see fiber_d2.engine.scaling.
    scaling=dict(reference_batch_size=None, rule=None),
    # What learns: "full", "freeze_text", "linear_probe", "language_prompt_v1" to "_v4", see
    # fiber_d2.engine.tuning; None leaves it to the model.
    tuning=None,
    # Batches of dataloader.train.total_batch_size images that an optimiser step averages over;
    # max_iter and all periods count optimiser steps.
    accumulate=1,
    # So many steps in a row whose loss is not finite end the training; they change no weights.
    max_nonfinite=10,
    # Averaged weights beside the others, in checkpoints as "ema": dict(decay=0.999).
    ema=None,
    # Which weights are evaluated: "model", as published, or "ema".
    weights="model",
    # Weight decay falls as the rate does, but earlier: dict(milestones=[0.67, 0.89], ratio=0.667,
    # gamma=0.1) multiplies it by gamma at ratio times each of the rate's milestones.
    weight_decay_schedule=None,
    # Look at data, one step, memory and schedule before training (see docs/training.md).
    start_check=True,
    # Iterations between two pictures of training images with what is found in them; 0 draws none.
    picture_period=5000,
    # Arguments of wandb.init, such as dict(project="fiber"), where wandb is installed and wanted.
    wandb=None,
    # Keep model_best.pth, of the evaluation with the best metric: dict(metric=, mode="max" or
    # "min"), the metric as DATA SET/path in its results, such as custom_val/bbox/AP.
    best=None,
    # Stop when the metric of `best` was below its best in so many evaluations in a row:
    # dict(patience=8).
    early_stop=None,
    # Data sets on which the best checkpoint is evaluated once, after training, otherwise as the
    # first one of dataloader.test.
    test_best=[],
    # "cuda" means the CPU where there is no GPU.
    device="cuda",
    # Mixed precision; dtype "bfloat16" or "float16", None chooses what the device is good at.
    amp=dict(enabled=False, dtype=None),
    # Limit of the L2 norm of all gradients together; None does not clip.
    clip_grad=None,
    # Negative draws one.
    seed=0,
    # Test images drawn per data set: the first ones ("spread"), or so many of the best and so many
    # of the worst ("best_worst", as the option --vis).
    pictures=12,
    pictures_of="spread",
    # Check prompts and ground truth of the test sets before computing.
    self_check=True,
    # Go on from the predictions of an interrupted evaluation (the option --resume-eval).
    resume_eval=False,
    # Test-time augmentation: a node that lacks only the model, such as configs/common/tta.py's.
    tta=None,
    # Seconds that processes wait for each other, at the start and in each collective operation;
    # more than what one process does alone, such as scoring (the option --dist-timeout).
    timeout=1800,
    # Of DistributedDataParallel, see docs/scaling.md.
    ddp=dict(static_graph=False, gradient_as_bucket_view=True),
    # CPU threads of each process; None leaves it to torch.
    threads=None,
)
