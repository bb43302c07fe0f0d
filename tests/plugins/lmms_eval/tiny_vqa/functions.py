"""The functions of the task."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def process_results(doc, results):
    return {"words": len(results[0].split())}
