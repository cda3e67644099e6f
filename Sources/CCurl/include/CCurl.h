// The part of libcurl that HTTPStorage uses, loaded when the first HTTP name turns up: linked in,
// it would bring TLS, Kerberos and LDAP libraries into every start of the program. libcurl takes
// options through variadic functions, which Swift cannot call.
#ifndef CCURL_H
#define CCURL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/// Loads libcurl; to be called once. Returns NULL, or the reason why that failed.
///
/// - header: called with each line of an answer's head and the request's `context`.
/// - body: called with each part of an answer's body. Returns the number of bytes taken: `count`,
///   `ccurl_pause` to get the part again later, or less to end the transfer with an error.
const char *ccurl_load(
    void (*header)(void *context, const char *line, size_t count),
    size_t (*body)(void *context, const char *bytes, size_t count));

extern const size_t ccurl_pause;

/// The settings of all requests for one file. Strings are NULL if not given.
struct ccurl_settings {
    /// Header lines; see `ccurl_add_header`.
    void *headers;
    /// `user:password`.
    const char *credentials;
    const char *cookie;
    const char *authorities;
    const char *certificate;
    const char *key;
    /// Path of a unix socket; one in the abstract namespace has no path.
    const char *socket;
    const char *abstract_socket;
    /// Time in seconds without an answer, or without a byte of one, after which a request fails.
    long timeout;
    bool is_insecure;
    bool allows_http2;
    /// Number of redirects to follow.
    long redirects;
};

/// Adds a line to a list, which is NULL at first. Returns the list, or NULL without memory.
void *ccurl_add_header(void *list, const char *line);
void ccurl_free_headers(void *list);

/// The rest of a body that is still to be sent.
struct ccurl_body {
    const char *bytes;
    size_t size;
};

/// The contents of a request.
struct ccurl_command {
    const char *method;
    const char *url;
    /// `first-last`, in bytes; NULL asks for the whole file.
    const char *range;
    /// Header lines instead of those of the settings, or NULL.
    void *headers;
    /// The body, which lives as long as the request, as its bytes do; without bytes there is none.
    /// It is sent once. libcurl repeats a request by itself if the server closes a connection that
    /// it has used before, but not one of which a part of such a body was sent: the server may
    /// still be working on it, and would overwrite what is written later (`ccurl_lost`).
    struct ccurl_body *body;
};

/// Makes a request; NULL without memory.
///
/// - failure: `ccurl_failure_size` bytes for a message, which live as long as the request.
void *ccurl_request(
    const struct ccurl_settings *settings, const struct ccurl_command *command, char *failure,
    void *context);
extern const size_t ccurl_failure_size;

void ccurl_free(void *request);
/// Goes on with a request that `body` has paused.
void ccurl_go_on(void *request);
/// The status of the last answer; 0 without one.
long ccurl_status(void *request);
/// The address that redirects led to.
const char *ccurl_address(void *request);
/// Time in seconds from the end of the request to the first byte of the answer.
double ccurl_seconds_before_answer(void *request);

/// Whether both ends of the connection have one address.
bool ccurl_is_local(void *request);

/// Makes a set of connections, at most `most`; NULL without memory.
void *ccurl_multi(long most);
void ccurl_multi_free(void *multi);
/// Begins a request. Returns false if that cannot be done.
bool ccurl_multi_add(void *multi, void *request);
void ccurl_multi_remove(void *multi, void *request);
/// Sends and receives without waiting.
void ccurl_multi_perform(void *multi);
/// Waits until there is something to send or receive, for a wake-up, or for some milliseconds.
void ccurl_multi_wait(void *multi, int milliseconds);
/// May be called from any thread.
void ccurl_multi_wake(void *multi);
/// The next request that has ended; NULL if there is none.
///
/// - code: 0, or libcurl's number of the error.
void *ccurl_multi_next(void *multi, int *code, void **context);

/// The number of the error that there is no memory.
extern const int ccurl_no_memory;
/// The number of the error that the connection was lost while a body was sent.
extern const int ccurl_lost;
/// Libcurl's words for an error.
const char *ccurl_error(int code);

/// The kind of an error.
enum ccurl_kind {
    /// The next attempt may succeed: a lost connection, a stall, a short body.
    ccurl_kind_passing,
    /// No connection could be made.
    ccurl_kind_no_connection,
    /// `body` did not take what came.
    ccurl_kind_refused,
    ccurl_kind_lasting,
};
enum ccurl_kind ccurl_kind(int code);

#endif
