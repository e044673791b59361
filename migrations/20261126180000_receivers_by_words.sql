-- `/webhook1` and `/webhook2` are two receivers, and so are `/hook?mode=a` and `/hook?mode=b`: what names a receiver may have a digit in it,
-- and may be in the query. What is different in each webhook still stands for any such: longer numbers, and what has several digits or is
-- long. Jobs that wait keep the receiver they have.
--
-- A part is matched to its end without looking whether the end is there, since it always is: a look ahead at each character takes long, and
-- one message may have ten thousand webhooks. The digits of `%C3%A4` are none.
--
-- The first half says which server it is, so that a claim can tell the many receivers of one server from those of many.

create or replace function receiver_of(api_key_id uuid, url text) returns uuid
language sql stable strict as $$
    select encode(
        substring(sha256(convert_to(
            api_key_id::text || ' ' || lower(coalesce(substring(url from '^[^:/?#]+://[^/?#]+'), url)), 'UTF8'
        )) for 8)
        || substring(sha256(convert_to(
            regexp_replace(
                coalesce(left(substring(url from '^[^:/?#]+://[^/?#]+([^#]*)'), 512), ''),
                '([/?&=])(?:'
                    '[0-9]{3,}(?=[/?&=]|$)'
                    '|(?=(?:(?:%[0-9A-Fa-f]{2}|[^/?&=%0-9])*[0-9]){3})[^/?&=]{8,}'
                    '|(?=[^-_./?&=]{16,}(?:[/?&=]|$))(?=(?:%[0-9A-Fa-f]{2}|[^/?&=%0-9])*[0-9])[^/?&=]{16,}'
                ')', '\1*', 'g'
            ), 'UTF8'
        )) for 8),
    'hex')::uuid
$$;

comment on function receiver_of is 'The receiver of an address: 64 bits of SHA-256 over the API key, scheme, host and port, which are the server, and 64 over the first 512 characters of path and query. A part of these stands for any such if it is a number of three digits, has eight characters with three digits among them, or sixteen without - _ . and with a digit. A short key of fixed size, because jobs are ordered by it.';
