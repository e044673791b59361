-- `/ok-77aa1234` and `/hangs-3f2a9c1d` are two receivers: a word before an identifier, in lower case and followed by - _ or ., may name a
-- receiver as a whole part may. Jobs that wait keep the receiver they have.
--
-- 256 characters are looked at, not 512: the worst address took half a millisecond on a slow machine, and one statement may have ten
-- thousand of them, in ten seconds.

create or replace function receiver_of(api_key_id uuid, url text) returns uuid
language sql stable strict as $$
    select encode(
        substring(sha256(convert_to(
            api_key_id::text || ' ' || lower(coalesce(substring(url from '^[^:/?#]+://[^/?#]+'), url)), 'UTF8'
        )) for 8)
        || substring(sha256(convert_to(
            regexp_replace(
                coalesce(left(substring(url from '^[^:/?#]+://[^/?#]+([^#]*)'), 256), ''),
                '([/?&=](?:[a-z]{2,}[-_.])?)(?:'
                    '[0-9]{3,}(?=[/?&=]|$)'
                    '|(?=(?:(?:%[0-9A-Fa-f]{2}|[^/?&=%0-9])*[0-9]){3})[^/?&=]{8,}'
                    '|(?=[^-_./?&=]{16,}(?:[/?&=]|$))(?=(?:%[0-9A-Fa-f]{2}|[^/?&=%0-9])*[0-9])[^/?&=]{16,}'
                ')', '\1*', 'g'
            ), 'UTF8'
        )) for 8),
    'hex')::uuid
$$;

comment on function receiver_of is 'The receiver of an address: 64 bits of SHA-256 over the API key, scheme, host and port, which are the server, and 64 over the first 256 characters of path and query. A part of these, or what follows its first word, stands for any such if it is a number of three digits, has eight characters with three digits among them, or sixteen without - _ . and with a digit. A short key of fixed size, because jobs are ordered by it.';

comment on function set_receiver is 'Sets the receiver of a webhook job that was inserted without one: by a process of an earlier version.';
