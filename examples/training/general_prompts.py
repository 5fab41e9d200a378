"""Mixed chat prompts for the general heads: everyday instructions, and others composed here."""

import random
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from pydoc_data.topics import topics as pages

from corpora import read_jsonl

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
_TEXT_FORMS = (
    "Summarize: {}", "{}\nWhat is the main point of this text?", "Give this text a title.\n\n{}",
    "Summarize: {}",
)  # fmt: skip


def general_prompts(data_dir: Path, count: int, seed: int = 0) -> list[str]:
    """User messages: all of the data folder's, the others composed."""
    prompts = [str(row["prompt"]) for row in read_jsonl(data_dir / "general_prompts.jsonl")]
    rng = random.Random(seed)
    prompts += islice(_composed(rng), max(0, count - len(prompts)))
    rng.shuffle(prompts)
    return prompts[:count]


def _composed(rng: random.Random) -> Iterator[str]:
    """Topics in many forms, none twice; one in twelve German, one in twelve about a text."""
    topics = [topic.strip() for topic in _TOPICS.replace("\n", " ").split(";")]
    asked = [form.format(topic) for form, topic in product(_FORMS, topics)]
    rng.shuffle(asked)
    texts = list(pages.values())
    for index, prompt in enumerate(asked):
        if index % 10 == 0:
            sentence = " ".join(rng.choice(part) for part in _GERMAN)
            yield f"Translate German to English: {sentence}"
        elif index % 10 == 1:
            words = rng.choice(texts).split()
            start = rng.choice((0, len(words) // 3))
            text = " ".join(words[start : start + rng.randint(100, 350)])
            yield rng.choice(_TEXT_FORMS).format(text)
        yield prompt
