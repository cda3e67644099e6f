#include "CCurl.h"

#include <curl/curl.h>
#include <dlfcn.h>
#include <string.h>

const size_t ccurl_pause = CURL_WRITEFUNC_PAUSE;
const size_t ccurl_failure_size = CURL_ERROR_SIZE;
const int ccurl_no_memory = CURLE_OUT_OF_MEMORY;
const int ccurl_lost = CURLE_SEND_FAIL_REWIND;

#define FUNCTIONS(USE) \
    USE(global_init) USE(easy_init) USE(easy_setopt) USE(easy_getinfo) USE(easy_cleanup) \
    USE(easy_pause) USE(easy_strerror) USE(slist_append) USE(slist_free_all) USE(multi_init) \
    USE(multi_setopt) USE(multi_cleanup) USE(multi_add_handle) USE(multi_remove_handle) \
    USE(multi_perform) USE(multi_poll) USE(multi_wakeup) USE(multi_info_read)

// curl.h defines macros of these names, which check types.
#undef curl_easy_setopt
#undef curl_easy_getinfo
#undef curl_multi_setopt

#define FIELD(name) __typeof__(&curl_##name) name;
static struct { FUNCTIONS(FIELD) } curl;

static void (*on_header)(void *, const char *, size_t);
static size_t (*on_body)(void *, const char *, size_t);

const char *ccurl_load(
    void (*header)(void *, const char *, size_t), size_t (*body)(void *, const char *, size_t)) {
    on_header = header;
    on_body = body;
    // The flavours have one interface; one of them is nearly always there.
    static const char *const names[] = {"libcurl.so.4", "libcurl-gnutls.so.4"};
    void *library = NULL;
    for (size_t i = 0; !library && i < sizeof(names) / sizeof(*names); i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    if (!library) return strdup(dlerror());
#define FIND(name) \
    if (!(curl.name = (__typeof__(curl.name))dlsym(library, "curl_" #name))) \
        return "libcurl is too old";
    FUNCTIONS(FIND)
    return curl.global_init(CURL_GLOBAL_DEFAULT) == CURLE_OK ? NULL : "libcurl cannot start";
}

static size_t header(char *line, size_t size, size_t count, void *context) {
    on_header(context, line, size * count);
    return size * count;
}

static size_t body(char *bytes, size_t size, size_t count, void *context) {
    return on_body(context, bytes, size * count);
}

static size_t rest(char *buffer, size_t size, size_t count, void *context) {
    struct ccurl_body *body = context;
    size_t taken = size * count < body->size ? size * count : body->size;
    memcpy(buffer, body->bytes, taken);
    body->bytes += taken;
    body->size -= taken;
    return taken;
}

void *ccurl_add_header(void *list, const char *line) { return curl.slist_append(list, line); }
void ccurl_free_headers(void *list) { curl.slist_free_all(list); }

void *ccurl_request(
    const struct ccurl_settings *settings, const struct ccurl_command *command, char *failure,
    void *context) {
    CURL *easy = curl.easy_init();
    if (!easy) return NULL;
#define SET(option, value) curl.easy_setopt(easy, CURLOPT_##option, value)
    SET(URL, command->url);
    SET(RANGE, command->range);
    if (command->body->bytes) {
        // The method below takes the place of POST.
        SET(POST, 1L);
        SET(READFUNCTION, rest);
        SET(READDATA, command->body);
        SET(POSTFIELDSIZE_LARGE, (curl_off_t)command->body->size);
        SET(UPLOAD_BUFFERSIZE, 128L << 10);
    }
    if (strcmp(command->method, "GET") != 0) SET(CUSTOMREQUEST, command->method);
    SET(HEADERFUNCTION, header);
    SET(HEADERDATA, context);
    SET(WRITEFUNCTION, body);
    SET(WRITEDATA, context);
    SET(PRIVATE, context);
    SET(ERRORBUFFER, failure);
    SET(HTTPHEADER, (struct curl_slist *)(command->headers ? command->headers : settings->headers));
    SET(NOSIGNAL, 1L);
    // The option that replaces it is newer than the libraries of some distributions.
    SET(PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
    SET(REDIR_PROTOCOLS, (long)(CURLPROTO_HTTP | CURLPROTO_HTTPS));
    SET(FOLLOWLOCATION, settings->redirects > 0 ? 1L : 0L);
    SET(MAXREDIRS, settings->redirects);
    SET(NETRC, (long)CURL_NETRC_OPTIONAL);
    SET(HTTPAUTH, (long)CURLAUTH_ANY);
    SET(BUFFERSIZE, 128L << 10);
    // HTTP/2 sends all through one connection, which one core encrypts.
    SET(HTTP_VERSION, (long)(settings->allows_http2 ? CURL_HTTP_VERSION_2TLS : CURL_HTTP_VERSION_1_1));
    SET(CONNECTTIMEOUT, settings->timeout);
    SET(LOW_SPEED_LIMIT, 1L);
    SET(LOW_SPEED_TIME, settings->timeout);
    SET(SSL_VERIFYPEER, settings->is_insecure ? 0L : 1L);
    SET(SSL_VERIFYHOST, settings->is_insecure ? 0L : 2L);
    if (settings->credentials) SET(USERPWD, settings->credentials);
    if (settings->cookie) SET(COOKIE, settings->cookie);
    if (settings->authorities) SET(CAINFO, settings->authorities);
    if (settings->certificate) SET(SSLCERT, settings->certificate);
    if (settings->key) SET(SSLKEY, settings->key);
    if (settings->socket) SET(UNIX_SOCKET_PATH, settings->socket);
    if (settings->abstract_socket) SET(ABSTRACT_UNIX_SOCKET, settings->abstract_socket);
#undef SET
    return easy;
}

void ccurl_free(void *request) { curl.easy_cleanup(request); }
void ccurl_go_on(void *request) { curl.easy_pause(request, CURLPAUSE_CONT); }

long ccurl_status(void *request) {
    long status = 0;
    curl.easy_getinfo(request, CURLINFO_RESPONSE_CODE, &status);
    return status;
}

const char *ccurl_address(void *request) {
    char *address = NULL;
    curl.easy_getinfo(request, CURLINFO_EFFECTIVE_URL, &address);
    return address ? address : "";
}

double ccurl_seconds_before_answer(void *request) {
    double sent = 0, begun = 0;
    curl.easy_getinfo(request, CURLINFO_PRETRANSFER_TIME, &sent);
    curl.easy_getinfo(request, CURLINFO_STARTTRANSFER_TIME, &begun);
    return begun > sent ? begun - sent : 0;
}

bool ccurl_is_local(void *request) {
    char *ours = NULL, *theirs = NULL;
    curl.easy_getinfo(request, CURLINFO_LOCAL_IP, &ours);
    curl.easy_getinfo(request, CURLINFO_PRIMARY_IP, &theirs);
    return ours && theirs && *ours && strcmp(ours, theirs) == 0;
}

void *ccurl_multi(long most) {
    CURLM *multi = curl.multi_init();
    if (multi) {
        curl.multi_setopt(multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, most);
        curl.multi_setopt(multi, CURLMOPT_MAXCONNECTS, most);
    }
    return multi;
}

void ccurl_multi_free(void *multi) { curl.multi_cleanup(multi); }
bool ccurl_multi_add(void *multi, void *request) {
    return curl.multi_add_handle(multi, request) == CURLM_OK;
}
void ccurl_multi_remove(void *multi, void *request) { curl.multi_remove_handle(multi, request); }
void ccurl_multi_perform(void *multi) {
    int running;
    curl.multi_perform(multi, &running);
}
void ccurl_multi_wait(void *multi, int milliseconds) {
    curl.multi_poll(multi, NULL, 0, milliseconds, NULL);
}
void ccurl_multi_wake(void *multi) { curl.multi_wakeup(multi); }

void *ccurl_multi_next(void *multi, int *code, void **context) {
    CURLMsg *message;
    int rest;
    while ((message = curl.multi_info_read(multi, &rest))) {
        if (message->msg != CURLMSG_DONE) continue;
        *code = message->data.result;
        curl.easy_getinfo(message->easy_handle, CURLINFO_PRIVATE, context);
        return message->easy_handle;
    }
    return NULL;
}

const char *ccurl_error(int code) { return curl.easy_strerror(code); }

enum ccurl_kind ccurl_kind(int code) {
    switch (code) {
        case CURLE_COULDNT_CONNECT:
        case CURLE_COULDNT_RESOLVE_HOST:
        case CURLE_COULDNT_RESOLVE_PROXY:
        case CURLE_SSL_CONNECT_ERROR: return ccurl_kind_no_connection;
        case CURLE_WRITE_ERROR: return ccurl_kind_refused;
        case CURLE_PARTIAL_FILE:
        case CURLE_OPERATION_TIMEDOUT:
        case CURLE_GOT_NOTHING:
        case CURLE_SEND_ERROR:
        case CURLE_RECV_ERROR:
        case CURLE_HTTP2:
        case CURLE_HTTP2_STREAM: return ccurl_kind_passing;
        default: return ccurl_kind_lasting;
    }
}
