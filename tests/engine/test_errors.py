import multiprocessing
import threading

from fiber_d2.engine.errors import ErrorReporter


def test_one_of_all_that_end_together_speaks():
    first = multiprocessing.get_context("spawn").Semaphore(1)
    reporters = [ErrorReporter("program", first) for _ in range(16)]
    start, answers = threading.Barrier(len(reporters)), []

    def ask(reporter):
        start.wait()
        answers.append(reporter.is_first())

    threads = [threading.Thread(target=ask, args=[reporter]) for reporter in reporters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] * 15 + [True]
    assert not reporters[0].is_first()
    assert ErrorReporter("program").is_first()
