"""Posting lists of a segment, written from vectors as an index writes them."""

from soju.search.postings import Postings, PostingsWriter, check_vectors


def write(folder, vectors):
    rows, terms = vectors.shape
    folder.mkdir(exist_ok=True)
    writer = PostingsWriter(folder, terms)
    writer.add(check_vectors(vectors, rows=rows, terms=terms, place="test"))
    writer.finish()
    return Postings.open(folder, chunks=rows)
