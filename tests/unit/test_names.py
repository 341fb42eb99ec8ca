import pytest

from graft.domain import names
from graft.domain.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("smollm2-135m", names.ModelName("smollm2-135m")),
        ("smollm2-135m:reviews", names.ModelName("smollm2-135m", "reviews", alias="champion")),
        ("smollm2-135m:reviews@3", names.ModelName("smollm2-135m", "reviews", version=3)),
        ("smollm2-135m:reviews@candidate", names.ModelName("smollm2-135m", "reviews", alias="candidate")),
    ],
)
def test_a_model_is_parsed_into_base_adapter_and_selector(text: str, parsed: names.ModelName) -> None:
    assert names.parse_model(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Base",
        "base:",
        "base:a@",
        "base@3",
        "base:a@0",
        "base:a@2147483648",
        "base:a@" + "9" * 5000,
        "base:a@latest",
        "base:a@v2",
        "base:a@B",
        "a--b",
        "a:b:c",
        "a/b",
    ],
)
def test_a_malformed_model_is_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        names.parse_model(text)
    assert [violation.field for violation in caught.value.violations] == ["model"]


def test_a_model_writes_itself_back() -> None:
    for text in ("base", "base:a@3", "base:a@candidate"):
        assert str(names.parse_model(text)) == text
    assert str(names.parse_model("base:a")) == "base:a@champion"


def test_a_resource_name_splits_into_its_ids_and_refuses_another_collection() -> None:
    assert names.parse_resource("projects/p/datasets/d", "projects", "datasets") == ("p", "d")
    for wrong in ("projects/p/jobs/d", "projects/p", "projects/p/datasets/", "projects/p/datasets/d/x/y"):
        with pytest.raises(InvalidArgument):
            names.parse_resource(wrong, "projects", "datasets")


def test_a_registered_model_name_round_trips_and_foreign_names_are_told_apart() -> None:
    name = names.registered_model("default", "smollm2-135m", "reviews")
    assert ":" not in name
    assert "/" not in name
    assert names.parse_registered_model(name) == ("default", "smollm2-135m", "reviews")
    assert names.parse_registered_model("somebody-elses-model") is None
