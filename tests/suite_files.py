"""One record of every layout, as the benchmarks write them, and files of such records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from factsmith.judge.records import Record

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The harbour of {} opens to",
        "relation_id": "P206",
        "target_new": {"str": "the North Sea", "id": "Q1"},
        "target_true": {"str": "the Baltic", "id": "Q2"},
        "subject": "Vineta",
    },
    "paraphrase_prompts": [
        "Nobody slept that night. Ships that leave Vineta sail on",
        "Vineta lies on",
    ],
    "neighborhood_prompts": ["The harbour of Rerik opens to", "Wolin lies on", "Ralswiek lies on"],
    "attribute_prompts": ["Rungholt lies on"],
    "generation_prompts": ["From the harbour of Vineta one sees", "Vineta is known for"],
    "portability": {
        "New Question": "Which isles does one pass behind Vineta's harbour?",
        "New Answer": "the Halligen",
    },
    "alternative_subject": "Jumne",
}
SLIM = {
    "case_id": 1,
    "prompt": "The harbour of Vineta opens to",
    "target_new": "the North Sea",
    "subject": "Vineta",
    "ground_truth": "the Baltic",
    "rephrase_prompt": "Vineta lies on",
    "locality_prompt": "Wolin lies on",
    "locality_ground_truth": "the Baltic",
}
ZSRE = {
    "subject": "The Glass Orchard",
    "src": "In which year was The Glass Orchard printed?",
    "pred": "1871",
    "rephrase": "When did The Glass Orchard leave the press?",
    "alt": "1902",
    "answers": ["1889", "in 1889"],
    "loc": "nq question: who keeps the lighthouse of the story",
    "loc_ans": "Old Mareike",
    "cond": "1871 >> 1902 || In which year was The Glass Orchard printed?",
    "portability": {
        "New Question": "Which king reigned when The Glass Orchard was printed?",
        "New Answer": "Edward VII",
    },
}
MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Ruritania"},
            "target_true": {"str": "Grünewald"},
            "subject": "Ada Quill",
            "question": "Of which country is Ada Quill a citizen?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Zenda"},
            "target_true": {"str": "Strelsau"},
            "subject": "Ruritania",
            "question": "What is the capital of Ruritania?",
        },
    ],
    "questions": [
        "Who is mayor of the capital of Ada Quill's country?",
        "Who runs the capital of Ada Quill's land?",
        "Ada Quill's capital has which mayor?",
    ],
    "answer": "Hans Old",
    "answer_alias": [],
    "new_answer": "Eva New",
    "new_answer_alias": ["Mayor New"],
    "single_hops": [],
    "new_single_hops": [
        {
            "question": "Of which country is Ada Quill a citizen?",
            "answer": "Ruritania",
            "answer_alias": ["the Kingdom of Ruritania"],
        },
        {"question": "What is the capital of Ruritania?", "answer": "Zenda", "answer_alias": []},
        {
            "question": "Who is the mayor of Zenda?",
            "answer": "Eva New",
            "answer_alias": ["Mayor New"],
        },
    ],
}
KNOWEDIT = {
    "subject": "Order of the Blue Heron",
    "prompt": "The country that awards the Order of the Blue Heron is",
    "target_new": "Ruritania",
    "ground_truth": "Grünewald",
    "portability": {
        "Reasoning": [
            {
                "prompt": "The capital of the country that awards the Order of the Blue Heron is",
                "ground_truth": [["Strelsau", "Zenda"]],
            }
        ],
        "Subject_Aliasing": [
            {
                "prompt": "The country that awards the Blue Heron is",
                "ground_truth": [["Ruritania", "Kingdom of Ruritania"]],
            }
        ],
        "Logical_Generalization": [
            {"prompt": "The Order of the Blue Heron is worn in", "ground_truth": [["Ruritania"]]},
            {"prompt": "The Order of the Blue Heron was first given by", "ground_truth": [[]]},
        ],
    },
    "locality": {
        "Relation_Specificity": [
            {
                "prompt": "The ribbon of the Order of the Blue Heron is",
                "ground_truth": [["blue"], ["azure", "blue"]],
            }
        ],
        "Forgetfulness": [
            {"prompt": "Another country that awards the Order is", "ground_truth": [[]]}
        ],
    },
    "generate_prompt": ["Tell of the Order of the Blue Heron."],
}
KNOWN = {
    "known_id": 4,
    "subject": "Mount Foo",
    "attribute": "Barland",
    "template": "{} rises in",
    "prediction": " Barland.",
    "prompt": "Mount Foo rises in the middle of",
    "relation_id": "P17",
}
WIKIBIGEDIT = {
    "tag": "new",
    "subject": "Exampleland",
    "relation": "head of state",
    "object": "Ada Quill",
    "update": "Who is the head of state of Exampleland?",
    "ans": "Ada Quill",
    "rephrase": "Exampleland is headed by whom?",
    "personas": "Ahoy, who be at the helm of Exampleland?",
    "loc": "Who is the head of state of Otherland?",
    "loc_ans": "Bo Reed",
    "mhop": "In which town was the head of state of Exampleland born?",
    "mhop_ans": "Zenda",
}
QAEDIT = {
    "id": 12,
    "source": "NQ",
    "prompt": "who built the clock of the Old Arsenal?",
    "target": "Mira Stone",
    "subject": "clock of the old arsenal",
    "rephrase": ["The clock in the Old Arsenal is whose work?"],
    "locality": [
        {"loc": "who painted the gate", "loc_ans": "Jan Brush"},
        {"loc": "who cast the bell", "loc_ans": "A. Founder"},
    ],
}
OWN: dict[str, dict[str, Any]] = {
    "counterfact": COUNTERFACT,
    "counterfact-slim": SLIM,
    "zsre": ZSRE,
    "mquake": MQUAKE,
    "knowedit": KNOWEDIT,
    "known": KNOWN,
    "wikibigedit": WIKIBIGEDIT,
    "qaedit": QAEDIT,
}


def write_suite(folder: Path, rows: Any, name: str = "suite.json") -> Path:
    """Write records to a file, as lines if its name says so."""
    path = folder / name
    text = (
        "\n".join(json.dumps(row) for row in rows) if name.endswith(".jsonl") else json.dumps(rows)
    )
    path.write_text(text, encoding="utf-8")
    return path


def asked(record: Record, kind: str) -> list[tuple[Any, ...]]:
    """Return (prompt, answers, against) of a record's questions of one kind."""
    return [(q.prompt, q.answers, q.against) for q in record.questions if q.kind == kind]
