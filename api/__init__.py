"""The REST service. Imports no paddle: it inspects, records, queues and hands out."""
