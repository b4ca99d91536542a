"""Every deliberate fault can still be made: its text stands once in the file that it names."""

from tests.mutations import FAULTS, ROOT


def test_the_text_of_every_fault_is_there():
    found = {fault.name: (ROOT / fault.file).read_text().count(fault.text) for fault in FAULTS}
    assert found == dict.fromkeys(found, 1)
