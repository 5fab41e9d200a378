"""Mixed chat prompts for the general heads: the data folder's, and others composed here."""

import random
from pathlib import Path

from corpora import read_jsonl

Turns = list[str]
Talk = tuple[str, Turns]  # a tag and the user's turns

_TOPICS = """
photosynthesis; gravity; the water cycle; black holes; inflation; compound interest; machine
learning; neural networks; climate change; recycling; solar power; electric cars; vaccines;
antibiotics; the immune system; sleep; meditation; yoga; healthy breakfasts; running a marathon;
learning to swim; public speaking; job interviews; writing a resume; time management; saving
money; buying a house; renting a flat; planning a trip to Japan; a weekend in Paris; camping;
hiking in the Alps; growing tomatoes; house plants; training a puppy; adopting a cat; keeping
bees; baking bread; making pizza; vegetarian cooking; coffee; green tea; chocolate; the Roman
Empire; ancient Egypt; the French Revolution; the Industrial Revolution; the Second World War; the
printing press; the Silk Road; democracy; human rights; the stock market; supply and demand;
globalisation; remote work; leadership; teamwork; customer service; marketing a small business; a
bakery; social media; online privacy; passwords; databases; operating systems; the Internet;
encryption; blockchain; Python; JavaScript; open source; video games; chess; football; basketball;
the Olympic Games; jazz; classical music; the piano; painting; photography; poetry; Shakespeare;
science fiction; fairy tales; dinosaurs; whales; volcanoes; earthquakes; the Moon; Mars; the solar
system; atoms; electricity; magnets; DNA; evolution; the heart; the brain; memory; stress;
tigers; the Amazon rainforest; the Great Wall of China; New York; London; Australia; the Eiffel
Tower; the United Nations; taxes; insurance; law school; nursing; engineering; astronauts; trains;
airplanes; bicycles; clocks; mirrors; salt; sugar; rice; cheese; bananas; honey; tea; soap; glass;
paper; plastic; gold; diamonds; oil; wind turbines; batteries; smartphones; cameras; robots; maps;
calendars; weddings; birthdays; Halloween; dreams; laughter; music festivals; film making; dance;
theatre; comic books; languages; handwriting; mathematics; statistics; geometry; probability;
friendship; honesty; courage; a rainy day; the sea; autumn; winter; a lost key; an old lighthouse;
a talking dog; a robot that wants to paint; a journey by train
"""
_FORMS = (
    "What is {}?",
    "Explain {} in simple terms.",
    "Tell me about {}.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Give me five tips about {}.",
    "What are the advantages and disadvantages of {}?",
    "Why is {} important?",
    "How does {} work?",
    "Write a short email to a friend about {}.",
    "List ten facts about {}.",
    "Write an introduction for a blog post about {}.",
    "Describe {} in three sentences.",
    "What should a beginner know about {}?",
    "Create a plan for a week about {}.",
    "Write a dialogue between two people about {}.",
    "Give me three questions about {} with their answers.",
    "Summarize what is known about {}.",
    "Who is a famous person connected with {}?",
    "Compare {} with something similar.",
    "Who discovered or invented {}?",
    "When did {} begin?",
    "Where does the word for {} come from?",
    "What is the most famous example of {}?",
    "How much does {} cost?",
    "What are common mistakes with {}?",
    "Give me a quote about {}.",
    "You are an expert on {}. Answer a child's first question about it.",
    "Write a product description for something to do with {}.",
    "Rewrite this sentence more formally: I think {} is really great.",
    "What will change about {} in the future?",
    "Write a short speech about {}.",
)
_GERMAN = (
    ("Die Regierung", "Der Verein", "Das Unternehmen", "Die Stadt", "Der Trainer", "Eine Studie",
     "Die Polizei", "Der Minister", "Die Schule", "Der Sprecher der Firma"),
    ("hat am Montag angekündigt ,", "erklärte in einem Interview ,", "ist überzeugt ,",
     "teilte gestern mit ,", "bestreitet ,", "hofft ,"),
    ("dass die Preise im nächsten Jahr steigen .", "dass die neue Brücke bald eröffnet wird .",
     "dass viele Menschen ihre Arbeit verlieren könnten .", "dass das Spiel verschoben wurde .",
     "dass die Kosten zu hoch sind .", "dass niemand verletzt wurde .",
     "dass mehr Kinder mit dem Fahrrad fahren .", "dass es keine andere Lösung gibt ."),
)  # fmt: skip
_ARTICLE_FORMS = (
    "Summarize: {}", "{}\nWhat is the main point of this text?", "Give this text a title.\n\n{}",
    "Summarize: {}",
)  # fmt: skip


def data_conversations(data_dir: Path) -> list[Talk]:
    """Every (tag, turns) of the data folder's chat files, in file order."""
    talks: list[Talk] = [
        ("chat", [str(row["prompt"])]) for row in read_jsonl(data_dir / "general_prompts.jsonl")
    ]
    for row in read_jsonl(data_dir / "spec_bench_dev.jsonl"):
        talks.append((str(row["category"]), [str(turn) for turn in row["turns"]]))
    return talks


def split(
    items: list[Talk],
) -> tuple[list[Talk], list[Talk]]:
    """(for training, held out): every tenth is held out."""
    held = items[9::10]
    return [item for i, item in enumerate(items) if i % 10 != 9], held


def composed_conversations(articles: list[str], count: int, seed: int = 0) -> list[Talk]:
    """Prompts around topics, German sentences, and the given texts (training texts only)."""
    rng = random.Random(seed)
    topics = [topic.strip() for topic in _TOPICS.replace("\n", " ").split(";")]
    talks: list[Talk] = []
    for index in range(count):
        if index % 12 == 0:
            sentence = " ".join(rng.choice(part) for part in _GERMAN)
            talks.append(("translation", [f"Translate German to English: {sentence}"]))
        elif index % 12 == 1:
            # A half of an article is another article, and cheaper to read.
            words = rng.choice(articles).split()
            start = rng.choice((0, len(words) // 3))
            text = " ".join(words[start : start + rng.randint(100, 350)])
            talks.append(("text", [rng.choice(_ARTICLE_FORMS).format(text)]))
        else:
            talks.append(("chat", [rng.choice(_FORMS).format(rng.choice(topics))]))
    return talks
