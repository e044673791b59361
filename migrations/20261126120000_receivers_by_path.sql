-- One server may have an address that hangs and another that answers at once, and the first must not be in the way of the second. So the path
-- belongs to the receiver. Where it has the number of something in it, each webhook would go to a receiver of its own, of whom nothing is
-- known: what looks like one is left out. Jobs that wait keep the receiver they have.

create or replace function receiver_of(api_key_id uuid, url text) returns uuid
language sql stable strict as $$
    select encode(substring(sha256(convert_to(
        api_key_id::text || ' ' || lower(coalesce(substring(url from '^[^:/?#]+://[^/?#]+'), url))
            || regexp_replace(
                coalesce(substring(url from '^[^:/?#]+://[^/?#]+([^?#]*)'), ''), '/(?:[0-9]+|(?=[^/]*[0-9])[^/]{8,})(?=/|$)', '/*', 'g'
            ),
        'UTF8'
    )) for 16), 'hex')::uuid
$$;

comment on function receiver_of is 'The receiver of an address: the first 128 bits of SHA-256 over the API key, scheme, host, port and path, where a segment that is a number, or has eight characters and a digit among them, stands for any such. A short key of fixed size, because jobs are ordered by it.';
