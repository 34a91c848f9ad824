<?php
// A must-use plugin: this site calls nobody, neither wordpress.org nor itself. The server of the
// tests answers one request at a time, so that a call to itself would only end by its time limit.
add_filter( 'pre_http_request', fn() => new WP_Error( 'offline', 'This site calls nobody.' ) );
