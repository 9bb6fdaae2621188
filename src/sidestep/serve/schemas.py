"""The bodies of requests and of their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

Names: TypeAlias = Annotated[list[str], Field(min_length=1)]
Cell: TypeAlias = str | list[str]
Row: TypeAlias = str | dict[str, Cell]
Embedded: TypeAlias = str | Annotated[dict[Literal["text", "image", "video"], str], Field(min_length=1, max_length=1)]


class Body(BaseModel):
    """A body of a request, without members that are not known."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PredictBody(Body):
    """Rows and the tasks that answer them."""

    inputs: Annotated[
        Row | Annotated[list[Row], Field(min_length=1)],
        Field(
            description="One row or a list. A row is a text, or an object with the columns that its tasks read: "
            '"text", "text2", "image" and "audio" (files in base64), or the names that the task was trained with. '
            'A member "tasks" names tasks of this row alone.',
            examples=["A fine film.", [{"text": "A fine film.", "tasks": ["sentiment", "topic"]}]],
        ),
    ]
    task: str | None = Field(None, description="The task that answers all rows that name none.")
    tasks: Names | None = Field(None, description="Several such tasks.")
    probabilities: Literal["all", "one", "none"] = "all"
    too_long: Literal["cut", "refuse"] = Field("cut", description="What is done with rows that are too long.")


class EmbeddingsBody(Body):
    """As OpenAI's embeddings take it, with images and videos as Jina's have them."""

    model: str = Field(description="A task of retrieval, or the name of the backbone (GET /info).")
    input: Embedded | Annotated[list[Embedded], Field(min_length=1)] = Field(
        description='One or a list. Each is a text, or an object with a "text", or an "image" or a "video" in base64.',
        examples=["A fine film.", [{"text": "A dog."}, {"image": "iVBORw0KGgo..."}]],
    )
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class ClassifyBody(Body):
    """As Text Embeddings Inference's /predict takes it."""

    inputs: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2)]
        | Annotated[list[Annotated[list[str], Field(min_length=1, max_length=2)]], Field(min_length=1)]
    ) = Field(description="A text, a pair of texts, or a list of lists of one or two texts.")
    task: str | None = Field(None, description="Needed if the bank has several tasks.")
    truncate: bool = Field(False, description="Whether texts that are too long are cut.")
    raw_scores: Literal[False] = False


class AddBody(Body):
    """A task that lies where the server can read it."""

    path: str = Field(description="Of a task folder, from the folder that tasks are added from.")


class ProblemBody(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    advice: str
    request_id: str | None = None
    retry_after: int | None = None


class AnswerBody(BaseModel):
    """A task's answer to a row, or an error."""

    model_config = ConfigDict(extra="allow")

    prediction: Any = None
    probability: Any = None
    probabilities: dict[str, float] | None = None
    cut: bool | None = Field(None, description="True if the task did not read the whole row.")
    error: ProblemBody | None = None


class Usage(BaseModel):
    """What a request took."""

    rows: int
    tokens: int


class Timings(BaseModel):
    """Milliseconds: to read the rows, of the longest wait for a batch, of the batches, and of all together."""

    read_ms: float
    wait_ms: float
    run_ms: float
    total_ms: float


class Predictions(BaseModel):
    """For each row, by task, its answer."""

    results: list[dict[str, AnswerBody]]
    usage: Usage
    timings: Timings


class Embedding(BaseModel):
    """An embedding of a text, an image or a video."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens of the texts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """As OpenAI gives them."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Score(BaseModel):
    """A class and its probability."""

    label: str
    score: float


class TaskBody(BaseModel):
    """A task of the bank."""

    name: str
    method: str
    kind: str | None
    labels: list[str] | None
    reads: dict[str, str] | None = Field(description="By what a row may call it, the column that it was trained with.")
    max_length: int | None
    values: int
    bytes: int
    sha256: str


class Unreadable(BaseModel):
    """A task that cannot be used."""

    name: str
    reason: str


class TasksBody(BaseModel):
    """All tasks of the bank."""

    tasks: list[TaskBody]
    unreadable: list[Unreadable]


class State(BaseModel):
    """Whether the server works."""

    status: Literal["ok"]


class Info(BaseModel):
    """What is served, and how."""

    sidestep: str
    versions: dict[str, str | None]
    backbone: dict[str, Any]
    device: str
    methods: list[str]
    tasks: int
    limits: dict[str, Any]
    keys: bool = Field(description="Whether keys are asked for.")
