import re

import yaml
from report_runs import HOSTILE, score

from soju.core.results import Score
from soju.report.markdown import DataSource, Example, ModelCard, render_model_card


def card(**changes):
    return ModelCard(
        **{
            "name": "soju-splade",
            "summary": "Finds English documents for Korean queries.",
            "licence": "apache-2.0",
            "tags": ("sparse", "korean"),
            "pipeline_tag": "feature-extraction",
            "library_name": "sentence-transformers",
            "examples": (Example(title="Encode", code="model.encode('소주')"),),
            "scores": (Score.from_json(score("bm25", 0.4)), Score.from_json(score("soju", 0.8))),
            "data": (DataSource(name="Tatoeba", rows=4331, licence="CC BY 2.0 FR", attribution="Tatoeba users"),),
            "command": "soju train splade/ko-en",
            "seed": 7,
            "limits": ("Long documents are cut.",),
        }
        | changes
    )


def front_matter(text):
    found = re.match(r"---\n(.*?)\n---\n(.*)", text, flags=re.S)  # as the hub splits it
    assert found
    return yaml.safe_load(found[1]), found[2]


def test_the_front_matter_is_what_the_hub_reads():
    fields, body = front_matter(render_model_card(card()))
    assert fields == {
        "language": ["ko", "en"],
        "license": "apache-2.0",
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["sparse", "korean"],
    }
    assert body.startswith("\n# soju-splade\n")


def test_the_body_holds_scores_data_command_seed_and_limits():
    text = render_model_card(card())
    assert "| soju | **0.800** |" in text
    assert "| Tatoeba | 4,331 | CC BY 2.0 FR | Tatoeba users |" in text
    assert "```bash\nsoju train splade/ko-en\n```" in text
    assert "Seed: `7`" in text
    assert "- Long documents are cut." in text
    assert "```python\nmodel.encode('소주')\n```" in text


def test_what_is_not_known_is_left_out():
    text = render_model_card(ModelCard(name="m", summary="s", licence="other", licence_name="Own licence"))
    assert "## Scores" not in text
    assert "None" not in text
    assert front_matter(text)[0]["license_name"] == "Own licence"


def test_hostile_text_breaks_neither_the_front_matter_nor_the_body():
    for text in (*HOSTILE, "---\nlicense: mit"):
        fields, body = front_matter(render_model_card(card(name=text, tags=(text,), summary=text)))
        assert fields["license"] == "apache-2.0"
        assert fields["tags"] == [text]
        assert "<" not in body
