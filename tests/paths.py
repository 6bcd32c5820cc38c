"""Where the project lies, and the real scans and the model trained on them that some machines have beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEMO_MODEL = ROOT / "examples" / "demo_model"
SHARED = ROOT.parent / "shared"
TRAINED_MODEL = SHARED / "models" / "Dataset501_Abdomen" / "nnUNetTrainer__smallPlans__3d_fullres"
