"""What giantstep's own tests use and users' tests may: ranks as threads, faulty stores, contract suites."""
