"""What a recipe makes of plans, and of the file that says the class of every case."""

import copy

import pytest
from nnturbo.engine.errors import ModelError
from nnturbo.engine.model.classification import ClassificationScheme
from nnturbo.engine.model.plans import MULTI_TASK_NETWORK, parse_plan
from nnturbo.training.data.multi_task_plans import RECIPE_KEY, multi_task_plans, read_classes
from nnturbo.training.data.tables import DatasetError
from nnturbo.training.recipe import Recipe

from tests.engine.factory import dataset_json, plans_json

UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RECIPE = Recipe(head_stages=(0, 1))
CLASSES = ("0", "1", "2")


def head_of(plans):
    return plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["head"]


def make(plans=None, dataset=None, recipe=RECIPE, classes=CLASSES, configuration="3d_fullres"):
    return multi_task_plans(plans or plans_json(), configuration, dataset or dataset_json(), recipe, classes)


class TestPlans:
    def test_a_head_on_the_planned_network(self):
        plans, dataset = plans_json(), dataset_json()
        before = copy.deepcopy(plans)
        made = make(plans, dataset)
        assert plans == before
        architecture = made["configurations"]["3d_fullres"]["architecture"]
        assert architecture["network_class_name"] == MULTI_TASK_NETWORK
        assert architecture["arch_kwargs"]["backbone"] == UNET
        assert Recipe.parse(made[RECIPE_KEY]) == RECIPE
        scheme = parse_plan(made, dataset, "3d_fullres").classification
        assert scheme == ClassificationScheme(
            kind="attention", stages=(0, 1), class_names=CLASSES, focus_channels=(2,), hidden=64, queries=4, dropout=0.2
        )

    def test_a_head_that_is_there_gives_way_to_the_recipes(self):
        other = Recipe(head="gap_mlp", head_stages=(1,), head_hidden=5, focus_labels=("pancreas", "lesion"))
        assert make(make(), recipe=other) == make(recipe=other)
        assert head_of(make(recipe=other))["focus_channels"] == [1, 2]

    def test_channels_follow_values_not_the_order_of_names(self):
        dataset = dataset_json(labels={"lesion": 2, "background": 0, "pancreas": 1})
        assert head_of(make(dataset=dataset))["focus_channels"] == [2]

    def test_regions_have_channels_in_their_order(self):
        dataset = dataset_json(
            labels={"background": 0, "whole": [1, 2], "lesion": [2], "ignore": 3}, regions_class_order=[1, 2]
        )
        head = head_of(make(dataset=dataset))
        assert head["regions"] is True
        assert head["focus_channels"] == [1]

    def test_unknown_focus(self):
        with pytest.raises(ValueError, match="must be among the labels pancreas, lesion, got cyst, tumour"):
            make(recipe=Recipe(focus_labels=("cyst", "lesion", "tumour")))
        with pytest.raises(ValueError, match="got background"):
            make(recipe=Recipe(focus_labels=("background",)))

    def test_a_configuration_without_its_own_network(self):
        plans = plans_json()
        plans["configurations"]["3d_small"] = {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]}
        with pytest.raises(ValueError, match="configuration '3d_small' must have its own 'architecture' in the plans"):
            make(plans, configuration="3d_small")

    def test_an_unknown_configuration(self):
        with pytest.raises(ValueError, match="configuration must be among 3d_fullres, got '2d'"):
            make(configuration="2d")

    @pytest.mark.parametrize(
        ("changes", "rule"),
        [
            ({"head": "lstm"}, "kind must be one of gap_linear, gap_mlp, attention"),
            ({"head_stages": ()}, "stages must be different numbers from 0"),
            ({"head_hidden": 0}, "hidden must be 1 to"),
            ({"head_queries": -1}, "queries must be 1 to"),
            ({"head_dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ],
    )
    def test_a_head_that_cannot_be_built(self, changes, rule):
        with pytest.raises(ModelError, match=f"classification head: {rule}"):
            make(recipe=Recipe(**changes))

    def test_one_class_is_none(self):
        with pytest.raises(ModelError, match="class_names must be 2 to"):
            make(classes=("0",))


class TestClasses:
    def write(self, folder, *rows):
        path = folder / "classification_labels.csv"
        path.write_text("case,subtype,split\n" + "".join(f"{row}\n" for row in rows))
        return path

    def test_numbers_ascend(self, tmp_path):
        path = self.write(tmp_path, "a,10,train", "b,2,train", "c,0,validation", "d,2,train")
        assert read_classes(path) == ({"a": 2, "b": 1, "c": 0, "d": 1}, ("0", "2", "10"))

    def test_names_are_sorted_and_cases_without_one_left_out(self, tmp_path):
        path = self.write(tmp_path, "a,serous,train", "b,,test", "c,mucinous,train")
        assert read_classes(path) == ({"a": 1, "c": 0}, ("mucinous", "serous"))

    def test_a_case_twice(self, tmp_path):
        path = self.write(tmp_path, "a,0,train", "b,1,train", "a,1,train")
        with pytest.raises(DatasetError, match=r"classification_labels.csv must say .* once; twice it has a$"):
            read_classes(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(DatasetError, match="must say the class of every case, it is missing: make it with nnturbo"):
            read_classes(tmp_path / "classification_labels.csv")
